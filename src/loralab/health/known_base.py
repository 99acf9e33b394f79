"""What a base expects along rows, and what is kept of it so that it runs once.

Of each token the input of the output head is kept, some kilobytes; the head alone runs again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.health.forced import Row, run


class KnownBase:
    """A base by the logits it gives. as_base: puts it in the model's place, held still."""

    def __init__(self, as_base: Callable[[], AbstractContextManager[Any]]) -> None:
        self._as_base = as_base
        self._hidden: dict[tuple[Row, ...], Tensor | None] = {}
        self._head: Any = None

    @property
    def settled(self) -> bool:
        """Whether there is no more of it than what was kept."""
        return self._head is not None

    def logits(self, batch: tuple[Row, ...], keep: bool) -> Tensor:
        """(n, vocabulary) of a batch's predicted tokens. keep: the batch comes again."""
        hidden = self._hidden.get(batch)
        if hidden is None:
            with self._as_base() as causal:
                seen = run(causal, batch)
            if keep:
                self._hidden[batch] = seen.hidden.cpu() if seen.plain else None
            return seen.logits
        if self._head is not None:
            with torch.no_grad():
                return _logits(self._head, hidden)
        with self._as_base() as causal:
            return _logits(causal.get_output_embeddings(), hidden)

    def settle(self, causal: Any) -> None:
        """From now on what was kept is the base, with a copy of this model's output head.

        Raises:
            UserError: the model does more after its head than hand its logits on.
        """
        if any(hidden is None for hidden in self._hidden.values()):
            raise UserError(
                f"{type(causal).__name__} changes its logits after the output head, so what "
                "it expects now cannot be kept: give the base as a second model"
            )
        with torch.no_grad():
            self._head = copy.deepcopy(causal.get_output_embeddings())


def _logits(head: Any, hidden: Tensor) -> Tensor:
    device = next(head.parameters()).device
    logits: Tensor = head(hidden.to(device)[None])[0]
    return logits
