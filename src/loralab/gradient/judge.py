"""Completions of the model in training and of its base, through the batched engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Any

import torch

from loralab.config.training import GradientConfig
from loralab.engines.attention import attention_configs
from loralab.engines.batched import BatchedEngine
from loralab.gradient.attention import named_attention
from loralab.rollouts import Batch, Rollout, share_correct
from loralab.tasks.base import Task

Progress = Callable[[int, int], None]


class Judge:
    """Made over the base model, before anything is attached to it.

    Where the engine has a copy of the base in its own form and the adapter is two factors, the
    adapter is loaded into it as any other would be. Elsewhere (other engines, other kinds of
    adapter, the model itself in training) the engine runs the model as it stands.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        config: GradientConfig,
        limit: int | None = None,
    ) -> None:
        """limit: examples answered, None as many as the config's evaluation says."""
        wanted = config.evaluation
        examples = tuple(task.examples(wanted.split)[: wanted.limit if limit is None else limit])
        self.batch = Batch(task, wanted.split, examples, config.generation, str(config.seed))
        self._tokenizer = tokenizer
        self._threads = config.threads
        self._configs = attention_configs(model)
        self._attention = [c._attn_implementation_internal for c in self._configs]
        self._causal = model
        self._engine = BatchedEngine(model, tokenizer, threads=config.threads) if examples else None
        plain = config.adapter is not None and config.adapter.type == "lora"
        self._copies = plain and self.kernel.startswith("native")

    @property
    def kernel(self) -> str:
        return "none" if self._engine is None else self._engine.kernel

    def base(self, progress: Progress | None = None) -> list[Rollout]:
        """What the base answers; call it before the model is changed."""
        return self._answers(self._engine, None, progress)

    def trained(self, model: Any, progress: Progress | None = None) -> list[Rollout]:
        """What the model answers as it is now; random numbers of the training are left alone."""
        if self._engine is None:
            return []
        from loralab.adapters.extract import state_of

        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            if self._copies:
                self._engine.load({"trained": state_of(model)})
                return self._answers(self._engine, "trained", progress)
            name = next(iter(self._attention), None)
            with named_attention(self._causal, name):
                engine = BatchedEngine(
                    self._causal, self._tokenizer, backend="torch", threads=self._threads
                )
                return self._answers(engine, None, progress)

    def _answers(
        self, engine: BatchedEngine | None, adapter: str | None, progress: Progress | None
    ) -> list[Rollout]:
        if engine is None:
            return []
        return self.batch.judge(engine.generate(self.batch.requests(adapter), progress))


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
