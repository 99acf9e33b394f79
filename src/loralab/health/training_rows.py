"""The rows that a Trainer is about to learn, as its own collator labels them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.health.data import Tokens, tokens_of, tokens_of_batch
from loralab.health.still import generators_kept


def training_rows(loader: Any, limit: int) -> tuple[int | None, list[Tokens]]:
    """How many rows a data loader's dataset has, None if it does not know, and the first of them.

    [] where rows are not tokens with a label each: prompts of a policy, pairs of a preference,
    texts with a class, a stream. Rows that are made when asked for, at random, are made as they
    would have been made without this.
    """
    dataset = getattr(loader, "dataset", None)
    try:
        count = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return None, []
    if not count:
        return count, []
    with generators_kept():
        rows = [dataset[at] for at in range(min(count, limit))]  # type: ignore[index]
        if not isinstance(rows[0], Mapping) or "input_ids" not in rows[0]:
            return count, []
        collate = getattr(loader, "collate_fn", None)
        if "labels" in rows[0] or collate is None:
            return count, list(tokens_of(rows)) if all(map(_by_token, rows)) else []
        return count, _collated(rows, collate)


def _collated(rows: Sequence[Any], collate: Any) -> list[Tokens]:
    """One row at a time, so that there is no padding that might be taken for text."""
    made: list[Tokens] = []
    for row in rows:
        batch = collate([row])
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
            return list(tokens_of(rows))
        if batch["labels"].shape != batch["input_ids"].shape:
            return []
        made += tokens_of_batch(batch)
    return made


def _by_token(row: Mapping[str, Any]) -> bool:
    """Whether a row is labelled token by token, or not at all; a class is one label a row."""
    labels = row.get("labels", row["input_ids"])
    return hasattr(labels, "__len__") and len(labels) == len(row["input_ids"])
