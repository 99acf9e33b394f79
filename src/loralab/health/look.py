"""Looking at a model: what it writes and what it expects, beside its base, each made once.

A `Subject` is a model over its whole life; `look()` is one moment of it. Probes read numbers off
a look; whatever several of them need (greedy completions, teacher-forced distributions) is made
on first use and kept. A model is left as it was found: weights, training mode, requires_grad,
forwards, attention, random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

from loralab.engines.prompts import PromptEncoder
from loralab.engines.stopping import end_tokens
from loralab.errors import UserError
from loralab.health.expecting import RowSet, expected
from loralab.health.forced import Forced, Row, compare
from loralab.health.greedy import Completion, complete
from loralab.health.known_base import KnownBase
from loralab.health.native_copy import NativeCopy, native_copy, plain_adapter
from loralab.health.probe import Probe, measure
from loralab.health.prompts import Prompt, as_prompts
from loralab.health.runners import ModelRunner, Runner
from loralab.health.still import base_of, causal_of, has_adapter, held_still
from loralab.health.text import Answer
from loralab.tasks.base import Message

__all__ = ["Completion", "Forced", "Look", "Probe", "Subject", "measure"]

OWN_TOKENS = 32
"""Of each of the model's own completions, from its beginning, that are read back."""

ALIKE = 0.05
"""Nats a token, KL of the model from the native engine's reading of it, up to which they are one
model: bf16's rounding makes a thousandth."""

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
        self.sets: dict[object, Callable[[Look], RowSet]] = {}
        """What has been read of a look by name, and comes again at the next."""
        self._known = KnownBase(ModelRunner(self.causal, self.as_base), self.as_base)
        self._kept: dict[object, Any] = {}
        self._layout: dict[int, bool] = {}
        if self._now:
            _ = self.base_completions
            good = RowSet(self.good_rows, base=True, keep=True)
            expected([good], ModelRunner(self.causal, self.as_model), self._known)
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
        if self._native is not None and (base or self._load_native()):
            return self._native.complete(self.requests, self.max_new_tokens, base)
        with self.as_base() if base else self.as_model() as causal:
            return complete(causal, self.tokenizer, self.requests, self.max_new_tokens)

    @cached_property
    def _native(self) -> NativeCopy | None:
        if self._now or self._second is not None or not self.has_base:
            return None
        with held_still(self.causal):
            return native_copy(self.model, self.causal, self.tokenizer)

    @cached_property
    def _native_known(self) -> KnownBase:
        assert self._native is not None
        return KnownBase(self._native.base, None)

    def _load_native(self) -> bool:
        """Whether the native copy has the adapter as it is now."""
        state = plain_adapter(self.model, self.causal)
        if self._native is None or state is None:
            return False
        self._native.load(state)
        return True

    def readers(self) -> tuple[Runner, KnownBase]:
        """What the model's rows run through as it stands now, and its base beside it.

        The native copy reads them where it reads one row as the model itself does: a forward that
        someone has replaced, or a hook, is not in the copy.
        """
        itself = ModelRunner(self.causal, self.as_model)
        rows = [row for row in self.good_rows if row.answer]
        if not rows or not self._load_native():
            return itself, self._known
        assert self._native is not None
        row = min(rows, key=lambda row: len(row.ids))
        copied, own = (by.run([row]).logits for by in (self._native.adapted, itself))
        apart = compare(row, own.float(), copied).kl.mean()
        if not apart <= ALIKE:
            return itself, self._known
        return self._native.adapted, self._native_known

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

    def expect_base(self, rows: Sequence[Row]) -> Forced:
        """What the base expects along rows, in the fields of the model; where there is none or its
        weights were not kept, what the model expects as it is."""
        return expected([RowSet(rows)], self.base_runner())[0]

    def base_runner(self) -> Runner:
        """What the base's rows run through; the model's where there is none, or no more of it than
        was kept."""
        if not self.has_base or self.only_kept:
            return ModelRunner(self.causal, self.as_model)
        if self._native is not None:
            return self._native.base
        return ModelRunner(self.causal, self.as_base)

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

    seconds: what was made for it, and how long that took, "completions" and "rows"; the first look
    of a subject makes the base's too.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.seconds: dict[str, float] = {}
        self._read: dict[object, Forced] = {}

    @cached_property
    def completions(self) -> tuple[Completion, ...]:
        """One a prompt, greedy."""
        return self._timed("completions", lambda: self.subject.complete(base=False))

    @property
    def base_completions(self) -> tuple[Completion, ...]:
        """The subject's; () without a base."""
        return self.subject.base_completions

    @cached_property
    def readers(self) -> tuple[Runner, KnownBase]:
        """What rows run through, and the base beside it."""
        return self.subject.readers()

    def expect(self, name: object, rows: Callable[[Look], RowSet]) -> Forced:
        """What the model expects along rows, in their order.

        Rows that were asked for by a name are read at later looks together with all others that
        were: of prompts that they share each runs once.
        """
        if name not in self._read:
            sets = self.subject.sets | {name: rows}
            self._timed("rows", lambda: self._expect(sets))
            self.subject.sets = sets
        return self._read[name]

    def _expect(self, sets: Mapping[object, Callable[[Look], RowSet]]) -> None:
        runner, known = self.readers
        base = known if self.subject.has_base else None
        names = [name for name in sets if name not in self._read]
        made = expected([sets[name](self) for name in names], runner, base)
        self._read |= zip(names, made, strict=True)

    @property
    def good(self) -> Forced:
        """Along the prompts' known-good texts and their end tokens."""
        return self.expect("good", _good)

    @property
    def own(self) -> Forced:
        """Along the first 32 tokens of the model's own completions; without a base's numbers where
        only the model as it once stood is the base."""
        return self.expect("own", _own)

    def answers(self) -> tuple[Answer, ...]:
        """The completions beside their prompts, as text statistics take them."""
        return self.subject.as_answers(self.completions)

    def base_answers(self) -> tuple[Answer, ...]:
        """As `answers`, of the base; () without one."""
        return self.subject.as_answers(self.base_completions)

    def _timed(self, name: str, make: Callable[[], _T]) -> _T:
        began = time.perf_counter()
        made = make()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return made


def _good(look: Look) -> RowSet:
    return RowSet(look.subject.good_rows, base=True, keep=True)


def _own(look: Look) -> RowSet:
    subject = look.subject
    rows = [
        subject.row(
            index,
            request,
            made.token_ids[:OWN_TOKENS],
            made.ended and len(made.token_ids) <= OWN_TOKENS,
        )
        for index, (request, made) in enumerate(
            zip(subject.requests, look.completions, strict=True)
        )
    ]
    return RowSet(rows, base=not subject.only_kept)
