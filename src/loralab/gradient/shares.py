"""What each process of a run takes of a batch.

`training.batch_size` counts the rows of all processes together: one config gives one result on any
number of them. Process p of w has rows p n / w to (p + 1) n / w of a batch of n, in the order in
which one process alone would see them. A last batch of fewer rows than processes leaves some with
none; these run a row that does not count, since all have to meet in the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader

from loralab.gradient.rows import IGNORED

BLANK = "blank"
"""The key of a batch that stands for no row at all; its labels say so too."""


class Shares:
    """A process's share of each batch of indices; an empty list where it has none."""

    def __init__(self, batches: BatchSampler, rank: int, world: int) -> None:
        self._batches = batches
        self._rank = rank
        self._world = world

    @property
    def sampler(self) -> Any:
        """Of the indices: Accelerate looks for it here, to seed it and to tell it the epoch."""
        return self._batches.sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self._batches.sampler = sampler

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            rank, size = self._rank, len(batch)
            yield batch[rank * size // self._world : (rank + 1) * size // self._world]


def shared_loader(
    rows: Any,
    sampler: Any,
    batch_size: int,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    device: torch.device,
    rank: int,
    world: int,
    mask: bool,
) -> Any:
    """A loader of this process's shares, on its device.

    batch_size: of all processes. mask: a batch for no row has its labels taken away; else it is as
    its row makes it, and whoever computes the loss leaves it out.
    """

    def given(records: Sequence[Any]) -> dict[str, Any]:
        if records:
            return collate(records)
        batch = collate([rows[0]])
        if mask:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return {**batch, BLANK: True}

    shares = Shares(BatchSampler(sampler, batch_size, drop_last=False), rank, world)
    loader: Any = DataLoader(rows, batch_sampler=shares, collate_fn=given)
    return prepare_data_loader(
        loader,
        device=device,
        num_processes=1,  # the shares are taken already
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
        use_seedable_sampler=True,
    )
