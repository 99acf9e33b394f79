"""Looking at a model: what it writes and what it expects, beside its base, each made once.

A `Subject` is a model over its whole life; `look()` is one moment of it. Probes read numbers off
a look; whatever several of them need (greedy completions, teacher-forced distributions) is made
on first use and kept. A model is left as it was found: weights, training mode, requires_grad,
forwards, attention, random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

from loralab.engines.prompts import PromptEncoder
from loralab.engines.stopping import end_tokens
from loralab.errors import UserError
from loralab.health import greedy
from loralab.health.forced import Forced, Row, batches, compare, run
from loralab.health.greedy import Completion
from loralab.health.known_base import KnownBase
from loralab.health.probe import Probe, measure
from loralab.health.prompts import Prompt, as_prompts
from loralab.health.still import base_of, causal_of, has_adapter, held_still
from loralab.health.text import Answer
from loralab.tasks.base import Message

__all__ = ["Completion", "Forced", "Look", "Probe", "Subject", "measure"]

OWN_TOKENS = 32
"""Of each of the model's own completions, from its beginning, that are read back."""

_T = TypeVar("_T")


class Subject:
    """What is looked at.

    model: a causal LM of Transformers, or a PeftModel around one (LoRA, LS-LoRA, SineLoRA, any
        that acts within the model's modules), in memory, in training or not.
    prompts: Prompt, text, or messages; None takes the shipped ones.
    base: None compares with the true base of a model with adapters, and with nothing where there
        are none; a second model compares with that; "now" with the model as it is at this moment,
        whose completions and expectations are kept (for whole models in training).
    seed: of what is drawn, such as which prompts are exchanged.
    max_new_tokens: of each completion.

    Raises:
        UserError: an adapter with virtual tokens (prompt tuning), an encoder-decoder, no prompts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        prompts: Sequence[Prompt | str | Sequence[Message]] | None = None,
        base: Any = None,
        seed: int = 0,
        max_new_tokens: int = 48,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = as_prompts(prompts)
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.causal = causal_of(model)
        if getattr(self.causal.config, "is_encoder_decoder", False):
            raise UserError(
                f"{type(self.causal).__name__} is an encoder-decoder: only causal language models "
                "can be looked at"
            )
        self.encoder = PromptEncoder(tokenizer)
        self.ends = end_tokens(self.causal, tokenizer)
        self._now = isinstance(base, str)
        if self._now and base != "now":
            raise UserError(f"base is {base!r}; expected a model in memory, None or 'now'")
        self._second = None if self._now else base
        self.has_base = base is not None or has_adapter(self.causal)
        self._known = KnownBase(self.as_base)
        self._kept: dict[object, Any] = {}
        self._layout: dict[int, bool] = {}
        if self._now:
            _ = self.base_completions
            self.expect(self.good_rows, base=True, keep=True)
            self._known.settle(self.causal)

    @property
    def only_kept(self) -> bool:
        """Whether of the base there is no more than what was kept of it ("now")."""
        return self._now

    @property
    def context(self) -> int | None:
        """Tokens that the model takes at most, where its config says so."""
        config = self.causal.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    @cached_property
    def requests(self) -> list[Any]:
        """The prompts as an engine is asked."""
        return [prompt.given_to(self.tokenizer) for prompt in self.prompts]

    @cached_property
    def base_completions(self) -> tuple[Completion, ...]:
        """One a prompt, made once; () without a base."""
        if not self.has_base:
            return ()
        return self.complete(base=True)

    @cached_property
    def good_rows(self) -> tuple[Row, ...]:
        """Prompts followed by their known-good texts and an end token; the base's own completion
        where there is no such text. A prompt that has neither gives no row."""
        own_end = self.tokenizer.eos_token_id
        rows = []
        for index, prompt in enumerate(self.prompts):
            if prompt.good is None and not self.has_base:
                continue
            if prompt.good is None:
                made = self.base_completions[index]
                answer, ends = made.token_ids, made.ended
            else:
                ids = self.tokenizer(prompt.good, add_special_tokens=False)["input_ids"]
                ends = own_end is not None
                answer = (*ids, own_end) if ends else tuple(ids)
            rows.append(self.row(index, self.requests[index], answer, ends))
        return tuple(rows)

    def row(self, index: int, request: Any, answer: Sequence[int], ends: bool) -> Row:
        """A row of a prompt, as an engine is asked, and the ids of an answer; cut to the model's
        context."""
        front = self.encoder.encode(request)
        ids = (*front, *answer)
        limit = self.context or len(ids)
        # Nothing stands before the first token that could predict it.
        return Row(index, ids[:limit], max(1, len(front)), ends and len(ids) <= limit)

    def look(self) -> Look:
        """The model as it is now."""
        return Look(self)

    @contextmanager
    def as_model(self) -> Iterator[Any]:
        """The model, held still."""
        with held_still(self.causal):
            yield self.causal

    @contextmanager
    def as_base(self) -> Iterator[Any]:
        """The base, held still.

        Raises:
            UserError: there is none any more ("now"), or the adapter is merged.
        """
        if self._second is not None:
            causal = causal_of(self._second)
            with held_still(causal):
                yield causal
        elif self._now and self._known.settled:
            raise UserError("the base was the model as it stood, of which no weights were kept")
        elif self._now:
            with self.as_model() as causal:
                yield causal
        else:
            with held_still(self.causal), base_of(self.model):
                yield self.causal

    def complete(self, base: bool) -> tuple[Completion, ...]:
        """Greedy completions of the prompts by the model as it stands, or by its base."""
        made = self._native_complete(base)
        if made is None:
            with self.as_base() if base else self.as_model() as causal:
                made = greedy.complete(causal, self.tokenizer, self.requests, self.max_new_tokens)
        return made

    def _native_complete(self, base: bool) -> tuple[Completion, ...] | None:
        """None where the model itself has to run."""
        if self._native is None:
            return None
        if base:
            return self._native.base(self.requests, self.max_new_tokens)
        state = greedy.plain_adapter(self.model, self.causal)
        if state is None:
            return None
        return self._native.adapted(state, self.requests, self.max_new_tokens)

    @cached_property
    def _native(self) -> greedy.NativeCopy | None:
        if self._now or self._second is not None or not self.has_base:
            return None
        with held_still(self.causal):
            return greedy.native_copy(self.model, self.causal, self.tokenizer)

    def as_answers(self, completions: Sequence[Completion]) -> tuple[Answer, ...]:
        """Completions of the prompts, as text statistics take them."""
        return tuple(
            Answer(
                prompt.shown,
                made.text,
                made.token_ids,
                made.ended,
                made.failed is not None,
                frozenset(filter(self.is_layout, made.token_ids)),
            )
            for prompt, made in zip(self.prompts, completions, strict=bool(completions))
        )

    def expect(self, rows: Sequence[Row], base: bool, keep: bool = False) -> Forced:
        """What the model expects along rows; beside its base where `base`.

        keep: the rows come again, so the base's part is worth keeping.
        """
        vocabulary = self.causal.config.get_text_config(decoder=True).vocab_size
        parts = []
        for batch in batches(rows, vocabulary):
            with self.as_model() as causal:
                logits = run(causal, batch).logits
            beside = self._known.logits(tuple(batch), keep) if base and self.has_base else None
            parts.append(compare(batch, logits, beside))
        return Forced.joined(parts).of_rows_in_order() if parts else Forced.none()

    def expect_base(self, rows: Sequence[Row]) -> Forced:
        """What the base expects along rows, in the fields of the model; where there is none or its
        weights were not kept, what the model expects as it is."""
        vocabulary = self.causal.config.get_text_config(decoder=True).vocab_size
        alone = self.as_base if self.has_base and not self.only_kept else self.as_model
        parts = []
        for batch in batches(rows, vocabulary):
            with alone() as causal:
                parts.append(compare(batch, run(causal, batch).logits, None))
        return Forced.joined(parts).of_rows_in_order() if parts else Forced.none()

    def once(self, key: object, make: Callable[[], _T]) -> _T:
        """What a probe (the key) makes of a subject at its first look, and keeps."""
        if key not in self._kept:
            self._kept[key] = make()
        made: _T = self._kept[key]
        return made

    def is_layout(self, token: int) -> bool:
        """Whether a token is whitespace alone."""
        if token not in self._layout:
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            self._layout[token] = bool(text) and not text.strip()
        return self._layout[token]


class Look:
    """One moment of a subject. What is asked for first after the weights have moved is of the
    moved weights: read a look before training goes on.

    seconds: what was made for it, and how long that took, "completions", "good" and "own"; the
    first look of a subject makes the base's too.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.seconds: dict[str, float] = {}

    @cached_property
    def completions(self) -> tuple[Completion, ...]:
        """One a prompt, greedy."""
        return self._timed("completions", lambda: self.subject.complete(base=False))

    @property
    def base_completions(self) -> tuple[Completion, ...]:
        """The subject's; () without a base."""
        return self.subject.base_completions

    @cached_property
    def good(self) -> Forced:
        """Along the prompts' known-good texts and their end tokens."""
        return self._timed(
            "good", lambda: self.subject.expect(self.subject.good_rows, base=True, keep=True)
        )

    @cached_property
    def own(self) -> Forced:
        """Along the first 32 tokens of the model's own completions; without a base's numbers where
        only the model as it once stood is the base."""
        return self._timed("own", self._own)

    def answers(self) -> tuple[Answer, ...]:
        """The completions beside their prompts, as text statistics take them."""
        return self.subject.as_answers(self.completions)

    def base_answers(self) -> tuple[Answer, ...]:
        """As `answers`, of the base; () without one."""
        return self.subject.as_answers(self.base_completions)

    def _own(self) -> Forced:
        subject = self.subject
        rows = [
            subject.row(
                index,
                request,
                made.token_ids[:OWN_TOKENS],
                made.ended and len(made.token_ids) <= OWN_TOKENS,
            )
            for index, (request, made) in enumerate(
                zip(subject.requests, self.completions, strict=True)
            )
        ]
        return subject.expect(rows, base=not subject.only_kept)

    def _timed(self, name: str, make: Callable[[], _T]) -> _T:
        began = time.perf_counter()
        made = make()
        self.seconds[name] = time.perf_counter() - began
        return made
