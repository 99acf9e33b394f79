"""When a completion ends: end tokens, stop strings, length; and the text it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loralab.engines.base import Completion, Sampling


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a sequence: the model's generation config and the tokenizer."""
    ends: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(owner, "eos_token_id", None)
        if isinstance(value, int):
            ends.add(value)
        elif isinstance(value, list | tuple):
            ends.update(value)
    return frozenset(ends)


class Decoder:
    """Turns ids into text, and finds stop strings in it."""

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.ends = ends
        self._specials = {
            str(token): index
            for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
            if token.special
        }

    def text(self, tokens: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        result: str = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return result

    def ends_for(self, stop: Sequence[str]) -> frozenset[int]:
        """End tokens together with stop strings that are special tokens, which text leaves out."""
        return self.ends | {self._specials[s] for s in stop if s in self._specials}

    def find_stop(self, tokens: Sequence[int], stop: Sequence[str]) -> int | None:
        """Where in the text of `tokens` the first stop string begins; None if none is there.

        Called after every token, so only the tail can hold a new one: a string of n UTF-8 bytes
        spans n tokens at most.
        """
        if not stop:
            return None
        reach = max(len(s.encode()) for s in stop) + 8
        tail = self.text(tokens[-reach:])
        if not any(s in tail for s in stop):
            return None
        text = self.text(tokens)
        found = [text.find(s) for s in stop]
        return min((place for place in found if place >= 0), default=None)


class Row:
    """One request on its way: what it has generated and whether it is done."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        member: int,
        limit: int,
        sampling: Sampling,
        decoder: Decoder,
    ) -> None:
        """limit: new tokens at most (no more than max_new_tokens and the model's context)."""
        self.index = index
        self.prompt = prompt
        self.member = member
        self.limit = limit
        self.sampling = sampling
        self.cost = 0
        """Memory it may come to take, in bytes."""
        self.tokens: list[int] = []
        self.completion: Completion | None = None
        self._decoder = decoder
        self._stop = tuple(s for s in sampling.stop if s)
        self._ends = decoder.ends_for(self._stop)

    @property
    def total(self) -> int:
        """Tokens at most, prompt included."""
        return len(self.prompt) + self.limit

    def accept(self, token: int) -> None:
        """Append a generated token; sets `completion` if it is the last one."""
        self.tokens.append(token)
        if token in self._ends:
            text = self._decoder.text(self.tokens[:-1])
            self.completion = Completion(text, tuple(self.tokens), "stop")
            return
        cut = self._decoder.find_stop(self.tokens, self._stop)
        if cut is not None:
            text = self._decoder.text(self.tokens)[:cut]
            self.completion = Completion(text, tuple(self.tokens), "stop")
        elif len(self.tokens) >= self.limit:
            text = self._decoder.text(self.tokens)
            self.completion = Completion(text, tuple(self.tokens), "length")

    def fail(self, why: str) -> None:
        """End with an error, keeping the text so far."""
        text = self._decoder.text(self.tokens)
        self.completion = Completion(text, tuple(self.tokens), "error", why)
