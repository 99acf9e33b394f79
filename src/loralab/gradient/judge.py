"""Held-out answers of the model in training and of its base, scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Any

from loralab.config.training import GradientConfig
from loralab.gradient.live import LiveEngine
from loralab.rollouts import Batch, Rollout, share_correct
from loralab.tasks.base import Task

Progress = Callable[[int, int], None]


class Judge:
    """Made over the base model, before anything is attached to it.

    limit: examples answered, None as many as the config's evaluation says. engine: one that is
    there already.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        config: GradientConfig,
        limit: int | None = None,
        engine: LiveEngine | None = None,
    ) -> None:
        wanted = config.evaluation
        examples = tuple(task.examples(wanted.split)[: wanted.limit if limit is None else limit])
        self.batch = Batch(task, wanted.split, examples, config.generation, str(config.seed))
        if engine is None and examples:
            engine = LiveEngine(model, tokenizer, config)
        self._engine = engine if examples else None

    @property
    def kernel(self) -> str:
        return "none" if self._engine is None else self._engine.kernel

    def base(self, progress: Progress | None = None) -> list[Rollout]:
        """What the base answers; call it before the model is changed."""
        if self._engine is None:
            return []
        return self.batch.judge(self._engine.base(self.batch.requests, progress))

    def trained(self, model: Any, progress: Progress | None = None) -> list[Rollout]:
        """What the model answers as it is now; random numbers of the training are left alone."""
        if self._engine is None:
            return []
        return self.batch.judge(self._engine.trained(model, self.batch.requests, progress))


def score_row(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """What an evaluation adds to its line of metrics; {} where nothing was answered."""
    if not rollouts:
        return {}
    rewards = [rollout.score.reward for rollout in rollouts]
    return {
        "held_out_reward": fmean(rewards),
        "held_out_std": pstdev(rewards),
        "held_out_correct": share_correct(rollouts),
        "failed": sum(rollout.failed is not None for rollout in rollouts),
    }
