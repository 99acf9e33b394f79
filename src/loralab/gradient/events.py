"""What a live display is told while a model is fine-tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingStarted:
    """Everything is loaded and the rows are made.

    tokens, learned: in all rows, and those of them with a label; 0 where rows are prompts whose
    completions are yet to be sampled. parameters: that are trained.
    resumed_at: steps that were done before, None for a new run.
    """

    model: str
    task: str
    rows: int
    tokens: int
    learned: int
    parameters: int
    steps: int
    resumed_at: int | None


@dataclass(frozen=True)
class Answering:
    """Completions of an evaluation that are done."""

    done: int
    of: int


@dataclass(frozen=True)
class Answered:
    """An evaluation is on disk. step: 0 is the base model. example: one prompt and its text."""

    step: int
    reward: float
    correct: float | None
    prompt: str
    completion: str


@dataclass(frozen=True)
class Evaluated:
    """A language model was tried. loss: per held-out token in nats, None where nothing is held
    out. text: what it wrote after `prompt`."""

    step: int
    loss: float | None
    prompt: str
    text: str


@dataclass(frozen=True)
class StepDone:
    """An update of the weights was made. step counts from 1; time_left in seconds."""

    step: int
    of: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    time_left: float


@dataclass(frozen=True)
class Remark:
    """Something the user should read, in one line."""

    text: str


@dataclass(frozen=True)
class TrainingEnded:
    """The steps are done, or it was stopped at a signal (then `complete` is False)."""

    complete: bool
    step: int


TrainingEvent = (
    TrainingStarted | Answering | Answered | Evaluated | StepDone | Remark | TrainingEnded
)
OnTrainingEvent = Callable[[TrainingEvent], None]


def ignore(event: TrainingEvent) -> None:
    """Tell no one."""
