"""A rectangular batch being decoded by `TorchBackend`.

Rows are prefilled in chunks, each padded on the left to its own longest prompt only; a prefix that
all prompts share is prefilled once per member. After that every step appends one column. Rows that
have finished ride along until enough of them have gathered to be worth squeezing out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loralab.engines.backend import StepOutput
from loralab.engines.cache import PopulationCache
from loralab.engines.lora_linear import Routing

if TYPE_CHECKING:
    from loralab.engines.torch_backend import TorchBackend

_PREFILL_TOKENS = {"cpu": 4096}
_PREFILL_TOKENS_GPU = 32768
"""Tokens of one prefill forward: bounds the memory of its activations."""
_WORTH_SHARING = 256
"""Prefill tokens that sharing a prefix must save, to pay for the extra forward."""
_SQUEEZE_AT = 7 / 8
"""Share of rows alive under which the others are squeezed out (moving the cache costs a copy)."""


class TorchSession:
    """Implements `loralab.engines.backend.Session` for one rectangular batch."""

    def __init__(self, backend: TorchBackend) -> None:
        self._backend = backend
        self._cache: PopulationCache | None = None
        self._slots: list[int] = []
        """Where in the batch each row stands."""
        self._members: list[int] = []
        """Member of each place of the batch, finished rows included."""
        self._routing: Routing | None = None
        self._mask = torch.empty(0)
        self._positions = torch.empty(0)
        self._columns = 0
        """Columns filled."""
        self._tokens: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_logits = torch.empty(0)
        self._steps_since_layout = 0

    @torch.inference_mode()
    def add(
        self,
        prompts: Sequence[Sequence[int]],
        members: Sequence[int],
        max_new_tokens: Sequence[int],
        want_logits: bool,
    ) -> StepOutput:
        """Prefill the batch. Raises ValueError on a second call: rows cannot join later."""
        if self._cache is not None:
            raise ValueError("rows cannot join a batch of the PyTorch backend: start a new session")
        backend, device = self._backend, self._backend.device
        rows = len(prompts)
        longest = max(len(p) for p in prompts)
        # The last new token is never fed back, so it needs no column.
        capacity = longest + max(max_new_tokens) - 1
        self._cache = PopulationCache(backend.layers, rows, capacity)
        self._slots = list(range(rows))
        self._members = list(members)
        self._routing = backend.route(members)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        columns = torch.arange(capacity, device=device)
        shared = self._worth_sharing(prompts)
        # Columns hold [shared prefix][padding][the prompt's own part][new tokens].
        own = lengths - shared
        self._mask = (columns < shared) | (columns >= longest - own[:, None])
        if backend.fixed:
            self._cache.blank(slice(0, rows), slice(longest, capacity))
        if shared:
            self._prefill_prefix(prompts[0][:shared])
        logits = [
            self._prefill(prompts, chunk, shared, longest)
            for chunk in _chunks([len(p) - shared for p in prompts], _prefill_tokens(device))
        ]
        self._columns = longest
        self._positions = lengths[:, None].clone()
        cursor = self._cache.cursor
        cursor.rows, cursor.first, cursor.past = slice(0, rows), 0, longest
        if backend.fixed:
            cursor.position = torch.tensor(longest, device=device)
        return step_output(torch.cat(logits), want_logits)

    def _worth_sharing(self, prompts: Sequence[Sequence[int]]) -> int:
        """Length of the prefix to prefill once per member; 0 where it does not pay.

        A sliding window counts columns, and padding between prefix and prompt would shift it.
        """
        repeats = len(prompts) - len(set(self._members))
        if self._backend.slides or repeats == 0:
            return 0
        ordered = sorted(tuple(p) for p in prompts)
        first, last = ordered[0], ordered[-1]
        limit = min(len(p) for p in prompts) - 1
        shared = 0
        while shared < limit and first[shared] == last[shared]:
            shared += 1
        return shared if shared * repeats >= _WORTH_SHARING else 0

    def _prefill_prefix(self, prefix: Sequence[int]) -> None:
        """Fill the first columns of every row from one forward per member."""
        assert self._cache is not None
        backend, device = self._backend, self._backend.device
        unique = list(dict.fromkeys(self._members))
        width = len(prefix)
        per_chunk = max(_prefill_tokens(device) // width, 1)
        for start in range(0, len(unique), per_chunk):
            members = unique[start : start + per_chunk]
            cache = PopulationCache(backend.layers, len(members), width)
            cache.cursor.rows = slice(0, len(members))
            tokens = torch.tensor([list(prefix)], device=device).expand(len(members), -1)
            positions = torch.arange(width, device=device).expand(len(members), -1)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            backend.forward(tokens, positions, mask, cache, backend.route(members))
            place = {member: index for index, member in enumerate(members)}
            targets = [row for row, member in enumerate(self._members) if member in place]
            sources = [place[self._members[row]] for row in targets]
            self._cache.copy_columns(cache, sources, targets, width)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], chunk: slice, shared: int, longest: int
    ) -> Tensor:
        """Run a chunk of rows, past the shared prefix; logits (rows, vocabulary) at their ends."""
        assert self._cache is not None
        backend, device = self._backend, self._backend.device
        own = [list(p[shared:]) for p in prompts[chunk]]
        # Behind a shared prefix all chunks end in the same columns: the prefix must be adjacent.
        width = longest - shared if shared else max(len(p) for p in own)
        padded = torch.tensor([[0] * (width - len(p)) + p for p in own], device=device)
        first = longest - shared - width
        mask = self._mask[chunk, first:longest]
        positions = (mask.long().cumsum(-1) - 1).clamp_(min=0)[:, -width:]
        if first:
            self._cache.blank(chunk, slice(0, first))
        cursor = self._cache.cursor
        cursor.rows, cursor.first, cursor.past = chunk, first, shared
        routing = backend.route(self._members[chunk])
        return backend.forward(padded, positions, mask, self._cache, routing)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, want_logits: bool) -> StepOutput:
        """Append one token to each row: tokens (rows,) int64."""
        assert self._cache is not None
        batch = tokens.to(self._backend.device)
        if len(self._slots) < len(self._members):
            places = torch.tensor(self._slots, device=batch.device)
            batch = batch.new_zeros(len(self._members)).index_copy_(0, places, batch)
        logits = self._fixed_step(batch) if self._backend.fixed else self._step(batch)
        self._columns += 1
        if len(self._slots) < len(self._members):
            logits = logits.index_select(0, places)
        return step_output(logits, want_logits)

    def _step(self, batch: Tensor) -> Tensor:
        assert self._cache is not None
        mask = self._mask[:, : self._columns + 1]
        logits = self._backend.forward(
            batch[:, None], self._positions, mask, self._cache, self._routing
        )
        self._positions += 1
        self._cache.cursor.past += 1
        return logits

    def _fixed_step(self, batch: Tensor) -> Tensor:
        """A step whose shapes and addresses stay the same until rows are squeezed out.

        On CUDA the first step of a layout runs as it is (and so warms up every kernel); the second
        is captured as a graph, which replays from then on.
        """
        if self._tokens is None:
            self._tokens = batch[:, None].clone()
        else:
            self._tokens.copy_(batch[:, None])
        self._steps_since_layout += 1
        if batch.device.type != "cuda" or self._steps_since_layout == 1:
            return self._fixed_forward()
        if self._graph is None:
            torch.cuda.synchronize(batch.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._graph_logits = self._fixed_forward()
            self._graph = graph
        self._graph.replay()
        return self._graph_logits

    def _fixed_forward(self) -> Tensor:
        """One forward over the whole buffers; advances the position on the device itself."""
        assert self._cache is not None
        assert self._tokens is not None
        position = self._cache.cursor.position
        assert position is not None
        logits = self._backend.forward(
            self._tokens, self._positions, self._mask, self._cache, self._routing
        )
        self._positions += 1
        position += 1
        return logits

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row not named."""
        self._slots = [self._slots[row] for row in rows]
        places = len(self._members)
        if self._backend.fixed:
            wanted = places
            # Halving keeps the number of distinct shapes, hence of graphs, logarithmic.
            while wanted > 1 and len(self._slots) <= wanted // 2:
                wanted //= 2
        else:
            wanted = len(self._slots) if len(self._slots) <= _SQUEEZE_AT * places else places
        if wanted < places and self._slots:
            self._squeeze(wanted)

    def _squeeze(self, wanted: int) -> None:
        """Shrink the batch to `wanted` places, the living rows among them."""
        assert self._cache is not None
        alive = set(self._slots)
        idle = [place for place in range(len(self._members)) if place not in alive]
        kept = sorted(self._slots + idle[: wanted - len(alive)])
        self._cache.squeeze(kept, self._columns)
        index = torch.tensor(kept, device=self._backend.device)
        self._mask = self._mask.index_select(0, index)
        self._positions = self._positions.index_select(0, index)
        self._members = [self._members[place] for place in kept]
        moved = {place: new for new, place in enumerate(kept)}
        self._slots = [moved[place] for place in self._slots]
        self._routing = self._backend.route(self._members)
        self._cache.cursor.rows = slice(0, wanted)
        self._tokens, self._graph, self._steps_since_layout = None, None, 0


def _prefill_tokens(device: torch.device) -> int:
    return _PREFILL_TOKENS.get(device.type, _PREFILL_TOKENS_GPU)


def _chunks(lengths: Sequence[int], tokens: int) -> list[slice]:
    """Runs of rows whose padded size stays within `tokens` (one row at least)."""
    chunks, start, longest = [], 0, 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > start and longest * (row + 1 - start) > tokens:
            chunks.append(slice(start, row))
            start, longest = row, length
    return [*chunks, slice(start, len(lengths))]


def step_output(logits: Tensor, want_logits: bool) -> StepOutput:
    """What a step returns for logits (rows, vocabulary).

    `.max` carries NaN through, takes the lowest index on ties, and is 6 x faster than `argmax` in
    bf16 on a CPU.
    """
    values, best = logits.max(-1)
    best = best.masked_fill(values.isnan(), -1)
    return StepOutput(best, logits.float() if want_logits else None)
