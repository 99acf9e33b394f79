"""`kind: verifier`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from loralab.config.sections import Positive, Section, TaskConfig
from loralab.config.training import CausalConfig


class SolutionsConfig(Section):
    """Solutions sampled from a generator, labelled right or wrong by the task.

    generator: the adapter (a directory in PEFT's format) that the base samples with; null is the
    base itself. examples: of the training split. samples: of each. temperature: of the sampling,
    its length and stops are those of `generation`. balance: leave out solutions of the commoner
    label, by the seed, until both are equally many.
    """

    generator: str | None = None
    examples: Positive = 500
    samples: Positive = 8
    temperature: float = Field(default=0.7, gt=0)
    balance: bool = True


class HeadConfig(Section):
    """at: "token" judges after every token of a solution, so that each prefix has a value; "end"
    judges after the last alone. lm_weight: of the language-model loss on the solutions beside the
    judgement's. candidates: of each held-out example, from which the verifier picks one.
    """

    at: Literal["token", "end"] = "token"
    lm_weight: float = Field(default=0.0, ge=0)
    candidates: int = Field(default=8, ge=2)


class VerifierConfig(CausalConfig):
    """A model that says how likely a solution is right (Cobbe et al. 2021, arXiv:2110.14168).

    `evaluation.limit` counts held-out examples, `verifier.candidates` the solutions of each.
    """

    kind: Literal["verifier"]
    task: TaskConfig
    solutions: SolutionsConfig = SolutionsConfig()
    verifier: HeadConfig = HeadConfig()

    @model_validator(mode="after")
    def _consistent(self) -> VerifierConfig:
        if self.training.packing:
            raise ValueError("training.packing: false: solutions already lie end to end")
        return self
