"""The population engine: every adapter and every prompt in one batched decode, in this process.

Requests become rows, sorted by adapter. A backend turns tokens into logits for all rows at once;
the engine chooses the next tokens, ends rows, and refills the batch as far as memory allows.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from loralab.adapters.state import AdapterState
from loralab.engines.backend import BASE, Backend, StepOutput
from loralab.engines.base import Completion, Progress, Request
from loralab.engines.base_weights import BaseWeights
from loralab.engines.memory import cache_budget
from loralab.engines.prompts import PromptEncoder
from loralab.engines.sampling import sample
from loralab.engines.stopping import Decoder, Row, end_tokens
from loralab.engines.torch_backend import TorchBackend
from loralab.errors import UserError

_log = logging.getLogger(__name__)

JOIN_SHARE = 1 / 8
"""Share of the memory that has to be free before waiting rows join the ones being decoded."""

BackendName = Literal["auto", "native", "torch"]


class BatchedEngine:
    """Generates for any mix of loaded LoRA adapters over one Transformers causal LM.

    backend: "native" (Llama-like models in bf16 on a CPU), "torch" (any model and device), or
        "auto": native where it can run the model, else torch.
    memory_gb: limit of the key-value cache in 10**9 bytes; None takes half of what is free.
    threads: CPU threads; None leaves PyTorch's own setting.

    Errors that a user can mend are UserError; whatever concerns one request alone comes back as a
    Completion with finish_reason "error".

    >>> engine = BatchedEngine(model, tokenizer)
    >>> engine.load({"a": state_a, "b": state_b})
    >>> engine.generate([Request("Once upon", "a"), Request("Once upon", "b")])
    """

    accepts: frozenset[str] = frozenset({"lora"})

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        backend: BackendName = "auto",
        memory_gb: float | None = None,
        threads: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._threads = threads
        self.backend = _make_backend(model, backend, threads)
        self._device: torch.device = model.get_input_embeddings().weight.device
        self._memory_gb = memory_gb
        self._encoder = PromptEncoder(tokenizer)
        self._decoder = Decoder(tokenizer, end_tokens(model, tokenizer))
        self._base = BaseWeights(model)
        self._changes: Mapping[str, Tensor] = {}
        text_config = model.config.get_text_config(decoder=True)
        self._context: int | None = getattr(text_config, "max_position_embeddings", None)
        self._vocabulary: int = text_config.vocab_size
        self._index: dict[str, int] = {}

    @property
    def kernel(self) -> str:
        """The backend in use, for the run's record: greedy text in bf16 differs between them."""
        return self.backend.name

    def load(self, adapters: Mapping[str, AdapterState]) -> None:
        """Replace the loaded adapters. Raises UserError for a kind this engine cannot run."""
        for name, state in adapters.items():
            if state.kind not in self.accepts:
                raise UserError(
                    f"adapter {name!r} is of kind {state.kind!r}: the batched engine runs "
                    f"{', '.join(sorted(self.accepts))} only"
                )
        self._index = {}
        self.backend.load(list(adapters.values()))
        self._index = {name: member for member, name in enumerate(adapters)}

    def set_base(self, changes: Mapping[str, Tensor]) -> None:
        """Set weights to the true base + change: (out, in) by module name.

        Modules not named go back to the true base, so `set_base({})` restores the model exactly.
        The very object of the last call changes nothing again: a search passes it every generation.
        """
        if changes is self._changes:
            return
        written = self._base.set(changes)
        self._changes = changes
        refresh = getattr(self.backend, "refresh_base", None)
        if refresh is not None:
            refresh(written)

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[Completion]:
        """Completions in the order of the requests. Raises UserError for an unknown adapter."""
        for request in requests:
            if request.adapter is not None and request.adapter not in self._index:
                known = ", ".join(list(self._index)[:8]) or "none"
                raise UserError(
                    f"adapter {request.adapter!r} is not loaded (loaded: {known}): call load first"
                )
        before = torch.get_num_threads()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            return self._generate(requests, progress)
        finally:
            torch.set_num_threads(before)

    def _generate(self, requests: Sequence[Request], progress: Progress | None) -> list[Completion]:
        budget = cache_budget(self._device, self._memory_gb)
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        for row in rows:
            row.cost = self.backend.row_bytes(row.total) + self._logits_bytes(row)
            if row.completion is None and row.cost > budget:
                row.fail(
                    f"{row.total} tokens need {row.cost / 1e9:.2f} GB of cache, more than the "
                    f"{budget / 1e9:.2f} GB allowed (memory_gb): shorten it or allow more"
                )
        finished = sum(row.completion is not None for row in rows)
        waiting = [row for row in rows if row.completion is None]
        # Waves of a rectangular batch cost as much as their longest row: like goes with like.
        if not self.backend.joins:
            waiting.sort(key=lambda row: -row.total)
        else:
            waiting.sort(key=lambda row: row.member)
        _Run(self, deque(waiting), budget, finished, len(rows), progress).finish()
        names = {member: name for name, member in self._index.items()}
        return [_named(row, names) for row in rows]

    def _row(self, index: int, request: Request) -> Row:
        prompt = self._encoder.encode(request.prompt)
        member = BASE if request.adapter is None else self._index[request.adapter]
        limit = request.sampling.max_new_tokens
        context = self._context
        if context is not None:
            limit = min(limit, context - len(prompt))
        row = Row(index, prompt, member, limit, request.sampling, self._decoder)
        if not prompt:
            row.fail("the prompt is empty and the tokenizer has no beginning-of-sequence token")
        elif limit < 1:
            row.fail(
                f"the prompt has {len(prompt)} tokens, which leaves no room in the model's "
                f"context of {context}: shorten it"
            )
        return row

    def _logits_bytes(self, row: Row) -> int:
        """Memory of a row's logits: bf16 and, to sample from, float32."""
        return self._vocabulary * (4 if row.sampling.temperature == 0 else 8)


class _Run:
    """One call of `generate`: rows waiting, rows being decoded, and the session they are in."""

    def __init__(
        self,
        engine: BatchedEngine,
        waiting: deque[Row],
        budget: int,
        finished: int,
        total: int,
        progress: Progress | None,
    ) -> None:
        self._engine = engine
        self._waiting = waiting
        self._budget = budget
        self._finished = finished
        self._total = total
        self._progress = progress
        self._active: list[Row] = []

    def finish(self) -> None:
        """Decode until every row has its completion."""
        backend = self._engine.backend
        session = backend.start()
        self._report(0)
        while self._waiting or self._active:
            if self._waiting and (backend.joins or not self._active):
                if not backend.joins:
                    session = backend.start()
                new = self._admit()
                if new:
                    output = session.add(
                        [row.prompt for row in new],
                        [row.member for row in new],
                        [row.limit for row in new],
                        _samples(new),
                    )
                    self._active += new
                    _choose(new, output)
                    self._drop(session)
                    continue
            tokens = torch.tensor([row.tokens[-1] for row in self._active])
            output = session.decode(tokens, _samples(self._active))
            _choose(self._active, output)
            self._drop(session)

    def _admit(self) -> list[Row]:
        """Take as many waiting rows as memory allows; at least one if nothing is active."""
        engine, backend, new = self._engine, self._engine.backend, list[Row]()
        if backend.joins:
            used = sum(row.cost for row in self._active)
            # A step that prefills a few rows streams all the weights for them: let rows gather.
            if self._active and used > self._budget * (1 - JOIN_SHARE):
                return new
            while self._waiting:
                used += self._waiting[0].cost
                if used > self._budget and (new or self._active):
                    break
                new.append(self._waiting.popleft())
            return new
        prompt = limit = logits = 0
        while self._waiting:
            row = self._waiting[0]
            prompt, limit = max(prompt, len(row.prompt)), max(limit, row.limit)
            logits += engine._logits_bytes(row)
            used = (len(new) + 1) * backend.row_bytes(prompt + limit) + logits
            if used > self._budget and new:
                break
            new.append(self._waiting.popleft())
        return sorted(new, key=lambda row: (row.member, row.index))

    def _drop(self, session: Any) -> None:
        """Take rows that are done out of the session."""
        alive = [place for place, row in enumerate(self._active) if row.completion is None]
        done = len(self._active) - len(alive)
        if done:
            session.keep(alive)
            self._active = [self._active[place] for place in alive]
            self._report(done)

    def _report(self, done: int) -> None:
        self._finished += done
        if self._progress is not None and (done or self._finished):
            self._progress(self._finished, self._total)


def _samples(rows: Sequence[Row]) -> bool:
    return any(row.sampling.temperature > 0 for row in rows)


def _choose(rows: Sequence[Row], output: StepOutput) -> None:
    """Give each row its next token, or end it where its logits are NaN."""
    picks: list[int] = output.best.tolist()
    drawn = [
        place
        for place, row in enumerate(rows)
        if row.sampling.temperature > 0 and picks[place] >= 0
    ]
    if drawn:
        assert output.logits is not None
        logits = output.logits
        if len(drawn) < len(rows):
            logits = logits[torch.tensor(drawn, device=logits.device)]
        settings = [rows[place].sampling for place in drawn]
        tokens = sample(logits, settings, [len(rows[place].tokens) for place in drawn])
        for place, token in zip(drawn, tokens.tolist(), strict=True):
            picks[place] = token
    for row, token in zip(rows, picks, strict=True):
        if token < 0:
            row.fail(f"logits are NaN at token {len(row.tokens)}")
        else:
            row.accept(token)


def _named(row: Row, names: Mapping[int, str]) -> Completion:
    """The row's completion, an error with the adapter's name before it."""
    done = row.completion
    assert done is not None
    if done.error is None:
        return done
    owner = f"adapter {names[row.member]!r}" if row.member in names else "base model"
    return Completion(done.text, done.tokens, done.finish_reason, f"{owner}: {done.error}")


def _make_backend(model: Any, wanted: BackendName, threads: int | None) -> Backend:
    """The backend asked for, or for "auto" the fastest one that can run the model."""
    if wanted not in ("auto", "native", "torch"):
        raise UserError(f"backend {wanted!r} is not known: choose auto, native or torch")
    if wanted == "torch":
        return TorchBackend(model)
    try:
        from loralab.engines.native.backend import NativeBackend
    except ImportError as error:
        reason: str | None = str(error)
    else:
        reason = NativeBackend.supports(model)
        if reason is None:
            try:
                native: Backend = NativeBackend(model, threads)
            except (OSError, RuntimeError, UserError) as error:
                reason = f"it did not build: {error}"
            else:
                return native
    if wanted == "native":
        raise UserError(f"the native backend cannot run this model: {reason}; use backend: torch")
    _log.info("the PyTorch backend runs this model; the native one cannot: %s", reason)
    return TorchBackend(model)
