"""A task's score of a model, with or without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from loralab.config import GenerationConfig
from loralab.engines.base import Engine, Progress
from loralab.errors import UserError
from loralab.evolution.rollouts import Batch, Rollout, share_correct
from loralab.tasks.base import Split, Task


@dataclass(frozen=True)
class Evaluation:
    """Judged completions of one split.

    reward, reward_std: over completions. correct: share of those the task judges, None if none.
    """

    task: str
    split: Split
    rollouts: Sequence[Rollout]

    @property
    def reward(self) -> float:
        return fmean(r.score.reward for r in self.rollouts)

    @property
    def reward_std(self) -> float:
        return pstdev(r.score.reward for r in self.rollouts)

    @property
    def correct(self) -> float | None:
        return share_correct(self.rollouts)

    @property
    def failed(self) -> int:
        """Completions that could not be generated or scored; they count at the reward floor."""
        return sum(r.failed is not None for r in self.rollouts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the completions included."""
        return {
            "task": self.task,
            "split": self.split,
            "examples": len(self.rollouts),
            "reward": self.reward,
            "reward_std": self.reward_std,
            "correct": self.correct,
            "failed": self.failed,
            "completions": [
                {
                    "example": r.example.id,
                    "prompt": r.prompt if isinstance(r.prompt, str) else list(r.prompt),
                    "completion": r.text,
                    "reward": r.score.reward,
                    "correct": r.score.correct,
                    "parts": dict(r.score.parts),
                    "failed": r.failed,
                }
                for r in self.rollouts
            ],
        }


def evaluate(
    engine: Engine,
    task: Task,
    settings: GenerationConfig,
    adapter: str | None = None,
    split: Split = "test",
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Generate and score a split's first `limit` examples (None: all).

    adapter: name of one the engine has loaded; None is the base model.
    """
    examples = tuple(task.examples(split)[:limit])
    if not examples:
        raise UserError(f"task {task.name}: the {split} split has no examples to evaluate")
    batch = Batch(task, split, examples, settings, str(seed))
    completions = engine.generate(batch.requests(adapter), progress)
    return Evaluation(task.name, split, batch.judge(completions))
