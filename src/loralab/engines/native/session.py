"""Rows being decoded by the native kernels, over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from loralab.engines.backend import StepOutput
from loralab.engines.native.pages import PAGE, PagePool

Ints = np.ndarray[Any, np.dtype[np.int32]]

PREFILL_ROWS = 512
"""Tokens a prefill step takes: enough to stay on arithmetic, few enough to stay in the cache."""


class Kernels(Protocol):
    """What a session needs of its backend."""

    pool: PagePool

    def reserve_positions(self, positions: int) -> None:
        """Make the rotary tables reach this many positions."""
        ...

    def forward(
        self,
        tokens: Ints,
        positions: Ints,
        sequence: Ints,
        member: Ints,
        pages: Ints,
        out_rows: Ints,
        want_logits: bool,
    ) -> StepOutput:
        """One native step."""
        ...


@dataclass
class _Row:
    """One sequence: its member, the tokens it holds in the cache and where."""

    member: int
    length: int
    pages: list[int] = field(default_factory=list)


class NativeSession:
    """Rows over a paged cache; rows may join while others decode."""

    def __init__(self, backend: Kernels) -> None:
        self._backend = backend
        self._pool = backend.pool
        self._rows: list[_Row] = []

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        members: Sequence[int],
        max_new_tokens: Sequence[int],
        want_logits: bool,
    ) -> StepOutput:
        """Prefill; blocks of 16 tokens that a row shares with an earlier one are not run again."""
        backend = self._backend
        longest = max(len(p) + n for p, n in zip(prompts, max_new_tokens, strict=True))
        backend.reserve_positions(longest)
        rows = [_Row(m, 0) for m in members]
        work: list[tuple[int, int]] = []  # (row, position) still to run
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            done = self._pool.take_prefix(row.member, prompt, row.pages)
            row.length = len(prompt)
            work.extend((index, position) for position in range(done, len(prompt)))
        table = self._table(rows)
        flat = np.array(work, dtype=np.int32).reshape(-1, 2)
        tokens = np.array([prompts[r][p] for r, p in work], dtype=np.int32)
        member_of = np.array([r.member for r in rows], dtype=np.int32)
        lengths = np.array([r.length for r in rows], dtype=np.int32)
        outputs = []
        for start in range(0, len(work), PREFILL_ROWS):
            part = flat[start : start + PREFILL_ROWS]
            sequence = np.ascontiguousarray(part[:, 0])
            positions = np.ascontiguousarray(part[:, 1])
            ends = np.flatnonzero(positions == lengths[sequence] - 1).astype(np.int32)
            outputs.append(
                backend.forward(
                    tokens[start : start + PREFILL_ROWS],
                    positions,
                    sequence,
                    member_of[sequence],
                    table,
                    ends,
                    want_logits,
                )
            )
        self._rows.extend(rows)
        return _join(outputs, want_logits)

    def decode(self, tokens: Tensor, want_logits: bool) -> StepOutput:
        """One token more for every row."""
        rows = self._rows
        positions = np.array([r.length for r in rows], dtype=np.int32)
        for row in rows:
            if row.length % PAGE == 0:
                row.pages.append(self._pool.take())
            row.length += 1
        count = len(rows)
        sequence = np.arange(count, dtype=np.int32)
        return self._backend.forward(
            tokens.numpy().astype(np.int32),
            positions,
            sequence,
            np.array([r.member for r in rows], dtype=np.int32),
            self._table(rows),
            sequence,
            want_logits,
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the rows not named and give their pages back."""
        kept = set(rows)
        for index, row in enumerate(self._rows):
            if index not in kept:
                self._pool.release(row.pages)
        self._rows = [self._rows[i] for i in rows]

    @staticmethod
    def _table(rows: Sequence[_Row]) -> Ints:
        width = max(len(r.pages) for r in rows)
        table = np.zeros((len(rows), width), dtype=np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row.pages)] = row.pages
        return table


def _join(outputs: Sequence[StepOutput], want_logits: bool) -> StepOutput:
    best = torch.cat([o.best for o in outputs])
    if not want_logits:
        return StepOutput(best, None)
    return StepOutput(best, torch.cat([o.logits for o in outputs if o.logits is not None]))
