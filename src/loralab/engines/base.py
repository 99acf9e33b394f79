"""What an engine is: many adapters loaded at once, requests for any of them in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from loralab.adapters.state import AdapterState
from loralab.tasks.base import Prompt

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    temperature 0 is greedy. top_k 0 and top_p 1 switch those filters off. `seed` belongs to the
    request: the same request gives the same text whatever shares its batch.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: must be in (0, 1]")


@dataclass(frozen=True)
class Request:
    """One completion to generate; `adapter` None is the base model."""

    prompt: Prompt
    adapter: str | None = None
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Completion:
    """The generated text without the prompt and without the end token.

    tokens: generated ids, an end-of-sequence id included if one ended it.
    finish_reason: "stop" (end token or stop string), "length", or "error" (then `error` says why
        and text holds what came before).
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    error: str | None = None


Progress = Callable[[int, int], None]
"""Called with (requests finished, requests in all)."""


class Engine(Protocol):
    """Generates for any mix of loaded adapters."""

    accepts: frozenset[str]
    """Adapter kinds it runs exactly."""

    def load(self, adapters: Mapping[str, AdapterState]) -> None:
        """Replace the loaded adapters by these."""
        ...

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[Completion]:
        """Completions in the order of the requests."""
        ...
