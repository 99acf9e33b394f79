"""`kind: seq2seq`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from loralab.config.sections import Positive, TaskConfig
from loralab.config.training import GradientConfig


class Seq2SeqConfig(GradientConfig):
    """An encoder-decoder such as T5: learn a task's gold answers from its prompts.

    prefix: put before every prompt ("summarize: "). target_length: tokens of an answer; the rest is
    cut off, as training.max_length does with the prompt. beams: of the search in evaluations; 1 is
    greedy.
    """

    kind: Literal["seq2seq"]
    task: TaskConfig
    prefix: str = ""
    target_length: Positive = 128
    beams: Positive = 1

    @model_validator(mode="after")
    def _no_packing(self) -> Seq2SeqConfig:
        if self.training.packing:
            raise ValueError("training.packing: false: an encoder sees one prompt")
        return self

    @model_validator(mode="after")
    def _no_stop(self) -> Seq2SeqConfig:
        if self.generation.stop:
            raise ValueError("generation.stop: none: an answer ends at its end token alone")
        return self
