"""A batch in parts: no more tokens go through the model at once than are needed to keep it busy.

Activations are most of the memory of a step, and grow with its tokens. A flat batch of sequences
can be cut between any two of them: each part goes forward and backward by itself, its loss divided
by the learned tokens of the whole update, and the gradients add up to the batch's. From about a
thousand tokens on, products on a CPU run no faster for more (measured: docs/bench-sft.md).

A part is filled up to a multiple of 32 tokens with a sequence that nobody learns. PyTorch's CPU
products are compiled for each number of rows they meet, and kept: 30 MB and 4 % of the time of each
step whose number is new.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loralab import ranks
from loralab.gradient.collate import LENGTHS
from loralab.gradient.loop import Watched
from loralab.gradient.rows import IGNORED

ENOUGH = 1024
"""Tokens from which the products of a small model run at full speed on a CPU."""
MULTIPLE = 32
"""What the tokens of a part are filled up to."""


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


def filled(batch: Mapping[str, Any], multiple: int) -> dict[str, Any]:
    """A flat batch with so many tokens more that their number is a multiple.

    They are a sequence of their own, without labels; what else is said of each token is said of
    these as of the last.
    """
    missing = -sum(batch[LENGTHS]) % multiple
    if not missing:
        return dict(batch)
    full = {
        name: torch.cat([value, value[:, -1:].expand(-1, missing)], dim=1)
        if isinstance(value, Tensor) and value.dim() > 1
        else value
        for name, value in batch.items()
    }
    full["labels"][:, -missing:] = IGNORED
    full["position_ids"][:, -missing:] = torch.arange(missing, device=full["labels"].device)
    return full | {LENGTHS: (*batch[LENGTHS], missing)}


class InParts(Watched):
    """Trains flat batches in parts of `tokens_at_once`, where one process trains.

    The loss of a part has to be its share of the batch's. together: as of `parts_of`. multiple: as
    of `filled`; not where tokens without labels add to the loss, as in a mixture of experts.
    """

    tokens_at_once: int | None = None
    together = 1
    multiple = 1

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
            for part in parts_of(inputs, self.tokens_at_once, self.together):
                yield filled(part, self.multiple)


def set_parts(trainer: InParts, causal: Any) -> None:
    """Have a trainer cut its batches as suits the device of a causal LM."""
    if next(causal.parameters()).device.type == "cpu":
        trainer.tokens_at_once = ENOUGH
        experts = getattr(causal.config, "num_experts", 0) or getattr(
            causal.config, "num_local_experts", 0
        )
        trainer.multiple = 1 if experts else MULTIPLE
