"""`kind: grpo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from loralab.config.sections import Positive, Section, TaskConfig
from loralab.config.training import CausalConfig


class PolicyConfig(Section):
    """group: completions sampled for each prompt, judged against each other.

    updates: how often each batch of completions is learned from; above 1 the clip matters.
    clip, clip_high: how far below and above 1 the ratio of new to old probability counts;
    clip_high null is clip. beta: weight of the KL divergence from the true base, 0 leaves it out.
    scale: "group" divides advantages by the group's standard deviation, "none" does not
    (arXiv:2503.20783). mean: of the loss over tokens of the whole batch (arXiv:2503.14476), or
    over completions of each one's mean over tokens (arXiv:2402.03300). micro_batch: completions
    in one forward pass, null for all. temperature: of the sampling; its length and stops are
    those of `generation`.
    """

    group: int = Field(default=8, ge=2)
    updates: Positive = 1
    clip: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float | None = Field(default=None, gt=0)
    beta: float = Field(default=0.0, ge=0)
    scale: Literal["group", "none"] = "group"
    mean: Literal["token", "sequence"] = "token"
    micro_batch: Positive | None = 8
    temperature: float = Field(default=1.0, gt=0)


class GrpoConfig(CausalConfig):
    """Group-relative policy optimisation of a task's reward.

    A step samples `training.batch_size` prompts, `grpo.group` completions each.
    """

    kind: Literal["grpo"]
    task: TaskConfig
    grpo: PolicyConfig = PolicyConfig()

    @model_validator(mode="after")
    def _whole_batches(self) -> GrpoConfig:
        training, updates = self.training, self.grpo.updates
        if training.steps is None:
            raise ValueError("training.steps, not epochs")
        if training.packing or training.grad_accumulation > 1:
            raise ValueError(
                "neither packing nor grad_accumulation: completions lie end to end already, and "
                "grpo.micro_batch bounds the memory"
            )
        if training.save_every % updates:
            raise ValueError(f"training.save_every to be a multiple of grpo.updates ({updates})")
        return self
