"""`kind: dpo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from loralab.config.sections import Section
from loralab.config.training import CausalConfig


class PreferenceDataConfig(Section):
    """Pairs of a chosen and a rejected answer.

    path: a data file, a folder with files named after their split, or a hub name. Rows hold
    `chosen` and `rejected`, whole conversations as text in HH-RLHF's form or as messages, or the
    two answers beside a `prompt`. test_path: held-out pairs; without it, and without a test file
    in the folder, test_share of the pairs, chosen by the seed.
    """

    path: str = Field(min_length=1)
    subset: str | None = None
    test_path: str | None = None
    test_share: float = Field(default=0.1, gt=0, lt=1)


class PreferenceConfig(Section):
    """beta: how much a change of log-probability, in nats, counts as reward.

    label_smoothing: the share of pairs taken to be the wrong way round. reference: what the
    changes are measured from. "base" is the model without any adapter, also where the adapter's
    start was taken out of its weights; "start" is the model as training finds it, which differs
    for an adapter that is not neutral at the start (a warm start, or tiny random factors).
    texts: held-out prompts that are answered before and after.
    """

    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    reference: Literal["base", "start"] = "base"
    texts: int = Field(default=4, ge=0)


class DpoConfig(CausalConfig):
    """Direct preference optimisation: make chosen answers likelier than rejected ones.

    `evaluation.limit` counts held-out pairs.
    """

    kind: Literal["dpo"]
    data: PreferenceDataConfig
    dpo: PreferenceConfig = PreferenceConfig()

    @model_validator(mode="after")
    def _no_packing(self) -> DpoConfig:
        if self.training.packing:
            raise ValueError("training.packing: false: pairs already lie end to end")
        return self
