"""Rows in two parts, chosen by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from loralab.data.documents import content, normalised
from loralab.data.sources import Row
from loralab.errors import UserError


@dataclass(frozen=True)
class Parts:
    """Two parts, each in the order the rows had.

    shared: places of test rows whose prompt (or whole text) is in the training part too.
    """

    train: tuple[Row, ...]
    test: tuple[Row, ...]
    shared: tuple[str, ...]


def split(rows: Sequence[Row], test: int, seed: int) -> Parts:
    """Put `test` rows, chosen by the seed alone, into the test part.

    Raises:
        UserError: no row would be left for one of the parts.
    """
    if not 0 < test < len(rows):
        raise UserError(f"split: {test} of {len(rows)} rows for the test, expected 1 or more, "
                        "and one left to train on")  # fmt: skip
    places = list(range(len(rows)))
    random.Random(seed).shuffle(places)
    held = set(places[:test])
    train_rows = tuple(row for number, row in enumerate(rows) if number not in held)
    test_rows = tuple(row for number, row in enumerate(rows) if number in held)
    seen = {_asked(row) for row in train_rows}
    shared = tuple(row.place for row in test_rows if _asked(row) in seen)
    return Parts(train_rows, test_rows, shared)


def _asked(row: Row) -> str:
    asked = next((row.data[key] for key in ("prompt", "question") if key in row.data), content(row))
    return normalised(str(asked))
