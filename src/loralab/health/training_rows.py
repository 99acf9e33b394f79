"""The rows that a Trainer is about to learn, as its own collator labels them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loralab.health.data import Tokens, tokens_of, tokens_of_batch
from loralab.health.pairs import IGNORED
from loralab.health.still import generators_kept

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class TrainingRows:
    """count: of the dataset, None if it does not know. tokens: its first rows; none where rows are
    not tokens with a label each: prompts of a policy, pairs of a preference, texts with a class, a
    stream. padding_learned: of the padding beside the shorter of two rows the share that has a
    label; None where nothing is padded."""

    count: int | None
    tokens: Sequence[Tokens] = ()
    padding_learned: float | None = None

    def values(self) -> dict[str, float]:
        """`data.padding_learned`."""
        known = self.padding_learned is not None
        return {"data.padding_learned": float(self.padding_learned or 0)} if known else {}


def training_rows(loader: Any, limit: int) -> TrainingRows:
    """What a data loader's dataset and collator make of the first `limit` rows.

    Rows that are made when asked for, at random, are made as they would have been made without
    this.
    """
    dataset = getattr(loader, "dataset", None)
    try:
        count = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return TrainingRows(None)
    if not count:
        return TrainingRows(0)
    with generators_kept():
        rows = [dataset[at] for at in range(min(count, limit))]  # type: ignore[index]
        if not isinstance(rows[0], Mapping) or "input_ids" not in rows[0]:
            return TrainingRows(count)
        collate: Collate | None = getattr(loader, "collate_fn", None)
        if "labels" not in rows[0] and collate is not None:
            tokens = _collated(rows, collate)
        else:
            tokens = list(tokens_of(rows)) if all(map(_by_token, rows)) else []
        padded = _padding_learned(rows, collate) if tokens and collate is not None else None
    return TrainingRows(count, tokens, padded)


def _collated(rows: Sequence[Any], collate: Collate) -> list[Tokens]:
    """One row at a time, so that there is no padding that might be taken for text."""
    made: list[Tokens] = []
    for row in rows:
        batch = collate([dict(row)])
        if not _has_labels(batch):
            return list(tokens_of(rows))
        if batch["labels"].shape != batch["input_ids"].shape:
            return []
        made += tokens_of_batch(batch)
    return made


def _padding_learned(rows: Sequence[Any], collate: Collate) -> float | None:
    """Of the shortest row and the longest in one batch."""
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    shortest, longest = by_length[0], by_length[-1]
    # Collators write into the rows they are given.
    alone, both = collate([dict(shortest)]), collate([dict(shortest), dict(longest)])
    if not (_has_labels(alone) and _has_labels(both)):
        return None
    text, ids, labels = alone["input_ids"], both["input_ids"], both["labels"]
    length = text.shape[-1]
    # A batch of one row is packed; rows of one length are not padded.
    if ids.shape != labels.shape or len(ids) != 2 or length >= ids.shape[-1]:
        return None
    stands_first = bool((ids[0, :length] == text[0]).all())
    padding = labels[0, length:] if stands_first else labels[0, :-length]
    return float(torch.mean((padding != IGNORED).float()))


def _has_labels(batch: Any) -> bool:
    return isinstance(batch, Mapping) and {"input_ids", "labels"} <= set(batch)


def _by_token(row: Mapping[str, Any]) -> bool:
    """Whether a row is labelled token by token, or not at all; a class is one label a row."""
    labels = row.get("labels", row["input_ids"])
    return hasattr(labels, "__len__") and len(labels) == len(row["input_ids"])
