"""Greedy completions of a model that is held still, by the engine that runs any as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine


@dataclass(frozen=True)
class Completion:
    """A greedy answer, without the prompt. token_ids: an end token included if one ended it.

    ended: by an end token. failed: why nothing more came (logits that are NaN), else None.
    """

    text: str
    token_ids: tuple[int, ...]
    ended: bool
    failed: str | None = None


def complete(
    causal: Any, tokenizer: Any, requests: Sequence[Any], max_new_tokens: int
) -> tuple[Completion, ...]:
    """Completions of a model that is held still, as it stands."""
    engine = BatchedEngine(causal, tokenizer, backend="torch")
    return generated(engine, requests, None, max_new_tokens)


def generated(
    engine: BatchedEngine, requests: Sequence[Any], adapter: str | None, max_new_tokens: int
) -> tuple[Completion, ...]:
    """What an engine answers, with one of its adapters or without."""
    sampling = Sampling(max_new_tokens)
    made = engine.generate([Request(request, adapter, sampling) for request in requests])
    return tuple(
        Completion(one.text, one.tokens, one.finish_reason == "stop", one.error) for one in made
    )
