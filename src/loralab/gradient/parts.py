"""A batch in parts: no more tokens go through the model at once than are needed to keep it busy.

Activations are most of the memory of a step, and grow with its tokens. A flat batch of sequences
can be cut between any two of them: each part goes forward and backward by itself, its loss divided
by the learned tokens of the whole update, and the gradients add up to the batch's. From about a
thousand tokens on, products on a CPU run no faster for more (measured: docs/bench-sft.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loralab import ranks
from loralab.gradient.collate import LENGTHS
from loralab.gradient.loop import Watched

ENOUGH = 1024
"""Tokens from which the products of a small model run at full speed on a CPU."""


def parts_of(batch: Mapping[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """Cut a flat batch (see `collate.flatten`) into parts of whole sequences.

    most: tokens of a part; a single sequence may have more.
    """
    lengths, start, place, stop = batch[LENGTHS], 0, 0, 0

    def part(end: int, stop: int) -> dict[str, Any]:
        cut = {
            name: value[:, start:stop] if isinstance(value, Tensor) and value.dim() > 1 else value
            for name, value in batch.items()
        }
        return cut | {LENGTHS: tuple(lengths[place:end])}

    for end, length in enumerate(lengths):
        if stop > start and stop + length - start > most:
            yield part(end, stop)
            start, place = stop, end
        stop += length
    yield part(len(lengths), stop)


class InParts(Watched):
    """Trains flat batches in parts of `tokens_at_once`, where one process trains."""

    tokens_at_once: int | None = None

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        most = self.tokens_at_once
        if (
            most is None
            or num_items_in_batch is None  # each part would be divided by its own tokens
            or LENGTHS not in inputs
            or ranks.world() > 1  # all have to take part in as many checks
        ):
            return super().training_step(model, inputs, num_items_in_batch)
        losses = [
            super(InParts, self).training_step(model, part, num_items_in_batch)
            for part in parts_of(inputs, most)
        ]
        return torch.stack(losses).sum()


def tokens_at_once(device: torch.device) -> int | None:
    """As many as keep a device busy; None: all of a batch."""
    return ENOUGH if device.type == "cpu" else None
