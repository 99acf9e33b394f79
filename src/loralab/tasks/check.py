"""Does a task's grader work? Gold answers must score full marks, and non-answers less."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from loralab.tasks.base import Example, Optioned, Score, Split, Task


@dataclass(frozen=True)
class Failure:
    """One completion that the task judged otherwise than it must.

    what: "gold", or the kind of non-answer: "empty", "newline", "newlines", "copied prompt",
        "listed options".
    reason: one line with the score.
    """

    example: str
    what: str
    reason: str


@dataclass(frozen=True)
class CheckResult:
    """What the check of one split found.

    examples: how many examples were checked.
    without_gold: ids of those that have no gold answer; they are no failure.
    """

    task: str
    split: Split
    examples: int
    without_gold: tuple[str, ...]
    failures: tuple[Failure, ...]

    @property
    def passed(self) -> bool:
        """No failure, and at least one gold answer that proves something."""
        return not self.failures and self.examples > len(self.without_gold)


def check(task: Task, split: Split, limit: int | None = None) -> CheckResult:
    """Prove on the first `limit` examples (None: all) that the grader tells gold from noise.

    Gold must not be marked wrong, must be worth more than empty text, newlines, the prompt copied
    back and, where the task's answers are a few words, a list of them all, and must be worth
    `task.full_marks` where the task names that number. None of the non-answers may be marked
    correct.
    """
    examples = task.examples(split)[:limit]
    without_gold = tuple(e.id for e in examples if task.gold(e) is None)
    failures = tuple(failure for e in examples for failure in _failures(task, e))
    return CheckResult(task.name, split, len(examples), without_gold, failures)


def _failures(task: Task, example: Example) -> Iterator[Failure]:
    completion = task.gold(example)
    gold = None if completion is None else task.score(example, completion)
    if gold is not None:
        full: float | None = getattr(task, "full_marks", None)
        if gold.correct is False:
            yield Failure(example.id, "gold", f"marked wrong: {_show(gold)}")
        if not math.isfinite(gold.reward):
            yield Failure(example.id, "gold", f"not finite: {_show(gold)}")
        if full is not None and not math.isclose(gold.reward, full, abs_tol=1e-9):
            yield Failure(example.id, "gold", f"not the full marks of {full:g}: {_show(gold)}")
    for what, text in _non_answers(task, example):
        score = task.score(example, text)
        if score.correct:
            yield Failure(example.id, what, f"marked correct: {_show(score)}")
        if gold is not None and not score.reward < gold.reward:
            yield Failure(
                example.id, what, f"worth no less than gold: {_show(score)} against {_show(gold)}"
            )


def _non_answers(task: Task, example: Example) -> Iterator[tuple[str, str]]:
    prompt = task.prompt(example)
    text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
    yield from (("empty", ""), ("newline", "\n"), ("newlines", "\n" * 256))
    yield "copied prompt", text
    if isinstance(task, Optioned):
        options = task.answer_options(example)
        for between in ("/", ", ", " or ", "\n"):
            # Both ways round: the last option must not pass for an answer, nor the first.
            yield "listed options", between.join(options)
            yield "listed options", between.join(reversed(options))


def _show(score: Score) -> str:
    parts = ", ".join(f"{name} {value:g}" for name, value in score.parts.items())
    return f"reward {score.reward:g}" + (f" ({parts})" if parts else "")
