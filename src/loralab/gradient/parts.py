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


def parts_of(batch: Mapping[str, Any], most: int, together: int = 1) -> Iterator[dict[str, Any]]:
    """Cut a flat batch (see `collate.flatten`) into parts of whole sequences.

    most: tokens of a part, if its first sequences alone have not more. together: sequences that
    are not parted, counted from the first.
    """
    lengths, start, place, stop = batch[LENGTHS], 0, 0, 0

    def part(end: int, stop: int) -> dict[str, Any]:
        cut = {
            name: value[:, start:stop] if isinstance(value, Tensor) and value.dim() > 1 else value
            for name, value in batch.items()
        }
        return cut | {LENGTHS: tuple(lengths[place:end])}

    for end in range(0, len(lengths), together):
        length = sum(lengths[end : end + together])
        if stop > start and stop + length - start > most:
            yield part(end, stop)
            start, place = stop, end
        stop += length
    yield part(len(lengths), stop)


class InParts(Watched):
    """Trains flat batches in parts of `tokens_at_once`, where one process trains.

    The loss of a part has to be its share of the batch's. together: as of `parts_of`.
    """

    tokens_at_once: int | None = None
    together = 1

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        losses = [
            super(InParts, self).training_step(model, part, num_items_in_batch)
            for part in self.parts(inputs)
        ]
        return torch.stack(losses).sum()

    def parts(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The batch, cut where it can be."""
        # Of several processes all have to take part in as many checks.
        if self.tokens_at_once is None or LENGTHS not in inputs or ranks.world() > 1:
            yield inputs
        else:
            yield from parts_of(inputs, self.tokens_at_once, self.together)


def tokens_at_once(device: torch.device) -> int | None:
    """As many as keep a device busy; None: all of a batch."""
    return ENOUGH if device.type == "cpu" else None
