"""Prompts of a task, what a model answers, and what the task makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from loralab.config import GenerationConfig
from loralab.engines.base import Completion, Request, Sampling
from loralab.errors import UserError
from loralab.scoring import Scorer, scored
from loralab.tasks.base import Example, Prompt, Score, Split, Task


@dataclass(frozen=True)
class Rollout:
    """One completion, judged. failed: it could not be generated or scored, and counts as an empty
    answer at the task's reward floor."""

    example: Example
    prompt: Prompt
    text: str
    tokens: int
    score: Score
    failed: str | None


@dataclass(frozen=True)
class Batch:
    """Prompts of one split, the same for every member that answers them.

    key: what sampling seeds come from, besides the example. scorer: of the same task, which scores
    in processes of its own; None scores here.
    """

    task: Task
    split: Split
    examples: tuple[Example, ...]
    settings: GenerationConfig
    key: str
    scorer: Scorer | None = None

    def requests(self, adapter: str | None) -> list[Request]:
        """One request an example.

        A prompt's sampling seed is the same for every member (common random numbers), so that
        members differ by their adapters and not by their luck.
        """
        settings = self.settings
        return [
            Request(
                self.task.prompt(example),
                adapter,
                Sampling(
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    top_k=settings.top_k,
                    top_p=settings.top_p,
                    seed=stable_hash(self.key, self.split, example.id) >> 1,
                    stop=tuple(settings.stop),
                ),
            )
            for example in self.examples
        ]

    def judge(self, completions: Sequence[Completion]) -> list[Rollout]:
        """Score completions that answer `requests`, in their order; or those of several adapters,
        one adapter's after the other's, which a scorer then shares out among its processes."""
        rounds = len(completions) // len(self.examples) if self.examples else 0
        pairs = list(zip(self.examples * rounds, completions, strict=True))
        if self.scorer is None:
            return [judge(self.task, example, completion) for example, completion in pairs]
        sound = [pair for pair in pairs if pair[1].finish_reason != "error"]
        asked = [(self.split, example.id, completion.text) for example, completion in sound]
        scores = iter(self.scorer.score(asked))
        rollouts = []
        for example, completion in pairs:
            score = next(scores) if completion.finish_reason != "error" else _why(completion)
            empty = self.scorer.empty(self.split, example) if isinstance(score, str) else None
            rollouts.append(_rollout(self.task, example, completion, score, empty))
        return rollouts


def judge(task: Task, example: Example, completion: Completion) -> Rollout:
    """Score one completion; what cannot be generated or scored gets the task's reward floor."""
    score: Score | str = _why(completion)
    if completion.finish_reason != "error":
        score = scored(task, example, completion.text)
    empty = scored(task, example, "") if isinstance(score, str) else None
    return _rollout(task, example, completion, score, empty)


def refuse_failures(rollouts: Sequence[Rollout], most: float, when: str) -> None:
    """Stop where rewards say too little to go on with.

    most: share of rollouts that may have failed. when: what they are of, as a message names it.

    Raises:
        UserError: more failed.
    """
    failed = [rollout.failed for rollout in rollouts if rollout.failed is not None]
    if len(failed) > most * len(rollouts):
        raise UserError(
            f"{when}: {len(failed)} of {len(rollouts)} completions could not be scored, more than "
            f"scoring.max_failed {most:g} allows; the first: {failed[0]}; mend the task, then "
            "continue with --resume"
        )


def _why(completion: Completion) -> str:
    return completion.error or "no completion"


def _rollout(
    task: Task,
    example: Example,
    completion: Completion,
    score: Score | str,
    empty: Score | str | None,
) -> Rollout:
    """empty: what the example's empty answer scores, where there is no score."""
    failed = score if isinstance(score, str) else None
    if isinstance(score, str):
        score = Score(task.reward_floor, correct=False)
        if isinstance(empty, Score):
            # A task that calls no answer right or wrong does not call a failure wrong either.
            correct = None if empty.correct is None else False
            score = replace(score, correct=correct, parts=empty.parts)
    prompt = task.prompt(example)
    return Rollout(example, prompt, completion.text, len(completion.tokens), score, failed)


def share_correct(rollouts: Sequence[Rollout]) -> float | None:
    """Share of correct answers among those that the task judges, None if it judges none."""
    judged = [r.score.correct for r in rollouts if r.score.correct is not None]
    return sum(judged) / len(judged) if judged else None


def completion_rows(
    batch: Batch, rollouts: Sequence[Rollout], generation: int, phase: str
) -> list[dict[str, Any]]:
    """Lines of a run's completions.jsonl."""
    when = {"generation": generation, "phase": phase, "split": batch.split}
    return [
        {**when, **completion_row(rollout), "gold": batch.task.gold(rollout.example)}
        for rollout in rollouts
    ]


def completion_row(rollout: Rollout) -> dict[str, Any]:
    """A line of JSON: what was asked and answered, its score, and its error."""
    prompt = rollout.prompt
    return {
        "example": rollout.example.id,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "completion": rollout.text,
        "reward": rollout.score.reward,
        "correct": rollout.score.correct,
        "parts": dict(rollout.score.parts),
        "failed": rollout.failed,
    }


def plain(prompt: Prompt) -> str:
    """The last thing said to the model, for a display."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def stable_hash(*parts: object) -> int:
    """64 bits that depend on the parts alone: the same in every process and on every machine."""
    text = "|".join(map(str, parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
