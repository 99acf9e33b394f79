"""Whether a score means anything: texts without merit must not beat the base, nor may an adapter
that does nothing change a metric.

An evaluation that scores prompt and completion together, takes the first answer it finds, asks one
question over and over, or compares with a baseline from elsewhere gives a number like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nan
from statistics import fmean
from typing import TYPE_CHECKING, Any

from loralab.tasks.base import Example, Measured, Optioned, Prompt, Score, Split, Task

if TYPE_CHECKING:
    from loralab.health.look import Look, Subject

Scorer = Callable[[Example, str], Score]
Prompter = Callable[[Example], Prompt]

_LEAD = "Let me think about it for a moment.\n"
_TURN = "\nNo, that is wrong.\n"


class CanaryProbe:
    """Of a task's first examples, and of the base alone, so that it is measured once for a subject.

    canary.empty, .newlines, .copied (the prompt), .options (all answers listed, where the task has
    a few): mean reward of that text less the base's mean reward; over 0 it out-scores the base.
    canary.gold: the gold answers' mean reward less the base's, to compare these with.
    canary.last_answer: share of wrong-then-right answers that count, less that of the gold alone,
    among examples where words before an answer do no harm; under 0 the first answer is taken.
    canary.prompts_distinct: distinct prompts / examples.
    canary.identity: largest change of any metric by an adapter of zeros on the base.
    canary.baseline: |reported score of the base - mean reward measured here|, where one is given.

    score, prompt: of the evaluation to be examined; None are the task's own. baseline: what it
    reports of the base.
    """

    name = "canaries"
    measures = "whether empty, copied or listed answers out-score the base on a task"
    cost = "the base's answers on the task's examples, twice, once for a subject"

    def __init__(
        self,
        task: Task,
        split: Split = "test",
        limit: int = 16,
        *,
        score: Scorer | None = None,
        prompt: Prompter | None = None,
        baseline: float | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        self._task = task
        self._examples = tuple(task.examples(split)[:limit])
        self._score = score or task.score
        self._prompt = prompt or task.prompt
        self._baseline = baseline
        self._max_new_tokens = max_new_tokens

    def measure(self, look: Look) -> dict[str, float]:
        if not self._examples:
            return {}
        return dict(look.subject.once(self, lambda: self._measured(look.subject)))

    def _measured(self, subject: Subject) -> dict[str, float]:
        values = unearned(self._task, self._examples, self._score, self._prompt)
        values |= {
            "last_answer": last_answer(self._task, self._examples, self._score),
            "prompts_distinct": distinct_prompts(self._examples, self._prompt),
        }
        if not subject.has_base or subject.only_kept:
            unmeasured = [name for name in values if name in _AGAINST_BASE]
            return {f"canary.{n}": nan if n in unmeasured else v for n, v in values.items()}
        requests = [self._prompt(example) for example in self._examples]
        plain, same = base_answers(subject, requests, self._max_new_tokens)
        base = mean_reward(self._task, self._score, self._examples, plain)
        for name in _AGAINST_BASE & values.keys():
            values[name] -= base
        if same is not None:
            values["identity"] = self._change(plain, same)
        if self._baseline is not None:
            values["baseline"] = abs(self._baseline - base)
        return {f"canary.{name}": value for name, value in values.items()}

    def _change(self, plain: Sequence[str], same: Sequence[str]) -> float:
        """The largest difference of any metric between two sets of answers."""
        before, after = (self._metrics(answers) for answers in (plain, same))
        return max(abs(before[name] - after[name]) for name in before)

    def _metrics(self, answers: Sequence[str]) -> dict[str, float]:
        own: Mapping[str, float] = {}
        if isinstance(self._task, Measured):
            own = self._task.metrics(list(zip(self._examples, answers, strict=True)))
        return {"reward": mean_reward(self._task, self._score, self._examples, answers), **own}


def unearned(
    task: Task, examples: Sequence[Example], score: Scorer, prompt: Prompter
) -> dict[str, float]:
    """Mean reward by kind of text without merit, the best of its forms; and of the gold answers."""

    def mean(text: Callable[[Example], str]) -> float:
        return mean_reward(task, score, examples, [text(example) for example in examples])

    values = {
        "empty": mean(lambda _: ""),
        "newlines": max(mean(lambda _, n=n: "\n" * n) for n in (1, 64)),  # type: ignore[misc]
        "copied": mean(lambda example: shown(prompt(example))),
    }
    golds = [task.gold(example) for example in examples]
    if None not in golds:
        values["gold"] = mean_reward(task, score, examples, [str(gold) for gold in golds])
    if isinstance(task, Optioned):
        values["options"] = max(
            mean(lambda example, s=s, d=d: s.join(list(task.answer_options(example))[::d]))  # type: ignore[misc]
            for s in ("/", ", ", " or ", "\n")
            for d in (1, -1)
        )
    return values


def last_answer(task: Task, examples: Sequence[Example], score: Scorer) -> float:
    """Share of answers that are right where a wrong one stands before the gold, less 1.

    Only examples count whose gold is right behind other words too: a task that wants nothing but
    the answer, or a program, is no first-match. NaN where none does.
    """
    golds = [(example, task.gold(example)) for example in examples]
    right = []
    for at, (example, gold) in enumerate(golds):
        if gold is None or "```" in gold or not _correct(score, example, _LEAD + gold):
            continue
        others = (golds[(at + step) % len(golds)][1] for step in range(1, len(golds)))
        wrong = next((o for o in others if o and _correct(score, example, o) is False), None)
        if wrong is not None:
            right.append(bool(_correct(score, example, wrong + _TURN + gold)))
    return fmean(right) - 1 if right else nan


def distinct_prompts(examples: Sequence[Example], prompt: Prompter) -> float:
    """Distinct prompts / examples."""
    return len({shown(prompt(example)) for example in examples}) / len(examples)


def mean_reward(
    task: Task, score: Scorer, examples: Sequence[Example], answers: Sequence[str]
) -> float:
    """The task's reward floor where scoring fails, as in an evaluation."""
    return fmean(
        _reward(task, score, example, answer)
        for example, answer in zip(examples, answers, strict=True)
    )


def shown(prompt: Prompt) -> str:
    """The words of a prompt."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def _reward(task: Task, score: Scorer, example: Example, answer: str) -> float:
    try:
        reward = score(example, answer).reward
    except Exception:  # other people's code, and what is examined here
        return task.reward_floor
    return reward if isfinite(reward) else task.reward_floor


def _correct(score: Scorer, example: Example, answer: str) -> bool | None:
    try:
        return score(example, answer).correct
    except Exception:  # as in `_reward`
        return False


_AGAINST_BASE = frozenset({"empty", "newlines", "copied", "options", "gold"})


def base_answers(
    subject: Subject, requests: Sequence[Any], max_new_tokens: int
) -> tuple[list[str], list[str] | None]:
    """The base's greedy answers, and those with an adapter of zeros on it, by the same engine;
    None where it can add none (a quantised base)."""
    from loralab.engines.base import Request, Sampling
    from loralab.engines.batched import BatchedEngine

    sampling = Sampling(max_new_tokens)
    with subject.as_base() as causal:
        engine = BatchedEngine(causal, subject.tokenizer, backend="torch")

        def answers(adapter: str | None) -> list[str]:
            asked = [Request(one, adapter, sampling) for one in requests]
            return [made.text for made in engine.generate(asked)]

        plain, identity = answers(None), identity_adapter(causal)
        if identity is None:
            return plain, None
        engine.load({"identity": identity})
        return plain, answers("identity")


def identity_adapter(causal: Any) -> Any:
    """An adapter of zeros on every plain linear layer but the head, as engines take one; None
    where there is none (a quantised model)."""
    import torch

    from loralab.adapters.state import AdapterState, Factors
    from loralab.adapters.targets import linear_weights

    factors = {
        name: Factors(torch.ones(1, weight.shape[1]), torch.zeros(weight.shape[0], 1))
        for name, weight in linear_weights(causal).items()
        if weight.is_floating_point() and not _is_adapter(name)
    }
    return AdapterState(factors, 1.0) if factors else None


def _is_adapter(name: str) -> bool:
    """A layer that PEFT has put in beside the model's own."""
    return any(part.startswith(("lora_", "modules_to_save")) for part in name.split("."))
