"""`kind: classify`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from loralab.config.sections import TaskConfig
from loralab.config.training import GradientConfig


class ClassifyConfig(GradientConfig):
    """A classifier on top of a language model: a head on the last token, trained with the adapter.

    task: one whose examples are texts of a few classes (sst2). `evaluation` counts texts;
    `generation` is not used, as nothing is generated.
    """

    kind: Literal["classify"]
    task: TaskConfig

    @model_validator(mode="after")
    def _no_packing(self) -> ClassifyConfig:
        if self.training.packing:
            raise ValueError("training.packing: false: a text is classified alone")
        return self
