"""What does the arithmetic under the batched engine: prefill and decode for rows of many members.

Two backends exist: `torch_backend` (any Transformers causal LM, any device) and `native`
(Llama-like models in bf16 on a CPU, one native call per step). The engine schedules, samples and
turns ids into text; a backend only turns tokens into logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loralab.adapters.state import AdapterState

BASE = -1
"""Member index of a row that runs the base model without an adapter."""


@dataclass(frozen=True)
class StepOutput:
    """Result of one forward step.

    best: (rows,) int64, argmax of the logits (lowest index on ties), -1 where they hold NaN.
    logits: (rows, vocabulary) float32, None unless asked for.
    """

    best: Tensor
    logits: Tensor | None


class Session(Protocol):
    """Sequences being decoded. Rows keep the order in which they were added."""

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        members: Sequence[int],
        max_new_tokens: Sequence[int],
        want_logits: bool,
    ) -> StepOutput:
        """Prefill new rows; the output holds the new rows alone, at their last prompt token."""
        ...

    def decode(self, tokens: Tensor, want_logits: bool) -> StepOutput:
        """Append tokens (rows,) int64, one to each row; the output holds every row."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row not named (indices ascending); the kept ones are renumbered."""
        ...


class Backend(Protocol):
    """Loaded members and sessions over them."""

    name: str
    """Names the kernels, for the run's record: never mix two within one run."""
    joins: bool
    """Whether `Session.add` may be called while other rows are decoding."""

    def load(self, adapters: Sequence[AdapterState]) -> None:
        """Members 0 .. n-1. Modules an adapter does not name are left alone."""
        ...

    def start(self) -> Session:
        """A new, empty session."""
        ...

    def row_bytes(self, tokens: int) -> int:
        """Cache memory that one row of this many tokens takes, in bytes."""
        ...
