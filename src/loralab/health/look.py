"""Looking at a model: what it writes and what it expects, beside its base, each made once.

A `Subject` is a model over its whole life; `look()` is one moment of it. Probes read numbers off
a look; whatever several of them need (greedy completions, teacher-forced distributions) is made
on first use and kept. A model is left as it was found: weights, training mode, forwards,
attention, random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from loralab.health.prompts import Prompt
from loralab.health.reading import Reading
from loralab.tasks.base import Message


@dataclass(frozen=True)
class Completion:
    """A greedy answer, without the prompt. token_ids: an end token included if one ended it.

    ended: by an end token. failed: why nothing more came (logits that are NaN), else None.
    """

    text: str
    token_ids: tuple[int, ...]
    ended: bool
    failed: str | None = None


@dataclass(frozen=True)
class Forced:
    """What a model expects along fixed texts, beside its base: one entry a token, float32, CPU.

    rows: (n,) int64, index of the prompt. tokens: (n,) int64, the token that stands there; the
    last of a row is the end token where `ends`.
    nll: (n,) nats of that token. entropy: (n,) nats of the next-token distribution.
    base_nll, base_entropy: the base's. kl: (n,) KL(model || base) over the full vocabulary, nats.
    agree: (n,) bool, the same most likely token. Without a base these four are NaN and False.
    """

    rows: Tensor
    tokens: Tensor
    ends: Tensor
    nll: Tensor
    entropy: Tensor
    base_nll: Tensor
    base_entropy: Tensor
    kl: Tensor
    agree: Tensor


class Subject:
    """What is looked at.

    model: a causal LM of Transformers, or a PeftModel around one (LoRA, LS-LoRA, SineLoRA, any
        that acts within the model's modules), in memory, in training or not.
    prompts: Prompt, text, or messages; None takes the shipped ones.
    base: None compares with the true base of a PeftModel, and with nothing where there is none; a
        second model compares with that; "now" with the model as it is at this moment, of which
        completions and expectations are kept (for whole models in training).
    max_new_tokens: of each completion.

    Raises:
        UserError: an adapter with virtual tokens (prompt tuning), an encoder-decoder.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        prompts: Sequence[Prompt | str | Sequence[Message]] | None = None,
        base: Any | Literal["now"] | None = None,
        seed: int = 0,
        max_new_tokens: int = 48,
    ) -> None:
        raise NotImplementedError

    prompts: tuple[Prompt, ...]
    model: Any
    tokenizer: Any
    seed: int

    @property
    def has_base(self) -> bool:
        """Whether there is something to compare with."""
        raise NotImplementedError

    @property
    def base_completions(self) -> tuple[Completion, ...]:
        """One a prompt, made once; () without a base."""
        raise NotImplementedError

    def look(self) -> Look:
        """The model as it is now."""
        raise NotImplementedError


class Look:
    """One moment of a subject. What is asked for first after the weights have moved is of the
    moved weights: read a look before training goes on."""

    subject: Subject

    @property
    def completions(self) -> tuple[Completion, ...]:
        """One a prompt, greedy."""
        raise NotImplementedError

    @property
    def base_completions(self) -> tuple[Completion, ...]:
        """The subject's."""
        raise NotImplementedError

    @property
    def good(self) -> Forced:
        """Along the prompts' known-good texts and their end token."""
        raise NotImplementedError

    @property
    def own(self) -> Forced:
        """Along the first 32 tokens of the model's own completions."""
        raise NotImplementedError


class Probe(Protocol):
    """Reads numbers off a look; the base's counterpart of "x" is "base.x"."""

    name: str

    def measure(self, look: Look) -> dict[str, float]:
        """Flat names to values; NaN where one could not be measured."""
        ...


def measure(look: Look, probes: Sequence[Probe], step: int) -> Reading:
    """Every probe's values in one reading, with examples (the worst texts first) and the time."""
    raise NotImplementedError
