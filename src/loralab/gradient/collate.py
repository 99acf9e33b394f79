"""Rows become a batch: padded, or laid end to end as one long row without any padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loralab.gradient.rows import IGNORED, Row

LENGTHS = "sequence_lengths"
"""The key of a flat batch that holds the lengths of its sequences, a tuple of ints."""


def pad(rows: Sequence[Row], pad_id: int) -> dict[str, Any]:
    """input_ids, attention_mask and labels, (rows, longest), padded on the right."""
    longest = max(len(row.input_ids) for row in rows)
    missing = [longest - len(row.input_ids) for row in rows]
    ids = [[*row.input_ids, *[pad_id] * m] for row, m in zip(rows, missing, strict=True)]
    labels = [[*row.labels, *[IGNORED] * m] for row, m in zip(rows, missing, strict=True)]
    mask = [[1] * (longest - m) + [0] * m for m in missing]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def flatten(rows: Sequence[Row]) -> dict[str, Any]:
    """input_ids, position_ids and labels, (1, tokens), and the lengths of the sequences.

    Positions begin anew with each sequence, and the first label of each is ignored: the token
    before it belongs to another sequence.
    """
    lengths = tuple(length for row in rows for length in row.sequences)
    ids = torch.tensor([[token for row in rows for token in row.input_ids]])
    labels = torch.tensor([[label for row in rows for label in row.labels]])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels[positions == 0] = IGNORED
    return {"input_ids": ids, "position_ids": positions, "labels": labels, LENGTHS: lengths}


def as_row(record: Mapping[str, Any]) -> Row:
    """A row from what `as_record` made of it."""
    lengths = record["seq_lengths"]
    return Row(
        tuple(record["input_ids"]), tuple(record["labels"]), tuple(lengths) if lengths else None
    )


def as_record(row: Row) -> dict[str, list[int]]:
    """Plain columns, as a `datasets.Dataset` holds them."""
    return {
        "input_ids": list(row.input_ids),
        "labels": list(row.labels),
        "seq_lengths": list(row.sequences),
    }


def token_count(batch: Mapping[str, Any]) -> int:
    """Tokens in a batch, padding left out."""
    if LENGTHS in batch:
        return sum(batch[LENGTHS])
    return int(batch["attention_mask"].sum())
