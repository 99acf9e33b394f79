"""What a base expects along rows, and what is kept of it so that it runs once.

Of each token the input of the output head is kept, some kilobytes, and the head alone runs again;
where that input is not known the logits are, as far as there is room for them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.health.forced import Row
from loralab.health.runners import Runner, by_row

ROOM = 2**28
"""Bytes of logits that are kept at most."""


class KnownBase:
    """A base by the logits it gives. runner: runs it. as_base: puts a model with its output head in
    place, held still; None where no head can be had."""

    def __init__(
        self, runner: Runner, as_base: Callable[[], AbstractContextManager[Any]] | None
    ) -> None:
        self._runner, self._as_base = runner, as_base
        self._hidden: dict[Row, Tensor] = {}
        self._logits: dict[Row, Tensor] = {}
        self._room = ROOM
        self._lost = False
        self._head: Any = None

    @property
    def settled(self) -> bool:
        """Whether there is no more of it than what was kept."""
        return self._head is not None

    def logits(self, rows: Sequence[Row], keep: bool) -> Tensor:
        """(n, vocabulary) of the rows' predicted tokens. keep: the rows come again."""
        if all(row in self._logits for row in rows):
            return torch.cat([self._logits[row] for row in rows])
        if all(row in self._hidden for row in rows):
            return self._of_hidden(torch.cat([self._hidden[row] for row in rows]))
        seen = self._runner.run(rows)
        if keep:
            self._keep(rows, seen.logits, seen.hidden)
        return seen.logits

    def settle(self, causal: Any) -> None:
        """From now on what was kept is the base, with a copy of this model's output head.

        Raises:
            UserError: the model does more after its head than hand its logits on.
        """
        if self._lost:
            raise UserError(
                f"{type(causal).__name__} changes its logits after the output head, so what "
                "it expects now cannot be kept: give the base as a second model"
            )
        with torch.no_grad():
            self._head = copy.deepcopy(causal.get_output_embeddings())

    def _keep(self, rows: Sequence[Row], logits: Tensor, hidden: Tensor | None) -> None:
        if hidden is not None and self._as_base is not None:
            self._hidden |= zip(rows, by_row(hidden.cpu(), rows), strict=True)
            return
        self._lost = True
        size = logits.numel() * logits.element_size()
        if size <= self._room:
            self._room -= size
            self._logits |= zip(rows, by_row(logits.cpu(), rows), strict=True)

    def _of_hidden(self, hidden: Tensor) -> Tensor:
        if self._head is not None:
            with torch.no_grad():
                return _logits(self._head, hidden)
        assert self._as_base is not None
        with self._as_base() as causal:
            return _logits(causal.get_output_embeddings(), hidden)


def _logits(head: Any, hidden: Tensor) -> Tensor:
    device = next(head.parameters()).device
    logits: Tensor = head(hidden.to(device)[None])[0]
    return logits
