"""Several files as one, and rows that are there twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.data.documents import IDENTITIES, content, normalised
from loralab.data.sources import Row, read_rows
from loralab.errors import UserError


@dataclass(frozen=True)
class Deduplicated:
    """kept: rows in their order. dropped: places of the others, each with the row it repeats."""

    kept: tuple[Row, ...]
    dropped: tuple[tuple[str, str], ...]


def merge(paths: Sequence[str | Path]) -> list[Row]:
    """The rows of files or folders, one after the other.

    Raises:
        UserError: files differ in their columns, or two rows that differ have the same id.
    """
    merged: list[Row] = []
    columns: set[str] | None = None
    named: dict[str, tuple[Row, str]] = {}
    for path in paths:
        for row in read_rows(path):
            row = Row(row.data, f"{path}: {row.place}")
            if columns is None:
                columns = set(row.data)
            elif set(row.data) != columns:
                raise UserError(
                    f"{row.place}: its columns are {', '.join(sorted(row.data))}, those of "
                    f"{merged[0].place} {', '.join(sorted(columns))}; convert one of the files"
                )
            for key in IDENTITIES:
                if key not in row.data:
                    continue
                other, _ = named.setdefault(f"{key} {row.data[key]!r}", (row, key))
                if other.data != row.data:
                    raise UserError(
                        f"{row.place} and {other.place} differ and have the same {key} "
                        f"{row.data[key]!r}; rename one of them"
                    )
            merged.append(row)
    return merged


def deduplicate(rows: Iterable[Row], exact: bool = False) -> Deduplicated:
    """The first of rows that are the same, their ids apart.

    exact: in every character. Otherwise case and space do not count, nor the kind of a character
        (full-width letters, ligatures).
    """
    seen: dict[str, str] = {}
    kept, dropped = [], []
    for row in rows:
        said = content(row)
        key = json.dumps(said if exact else _normal(said), sort_keys=True, default=str)
        first = seen.setdefault(key, row.place)
        if first is row.place:
            kept.append(row)
        else:
            dropped.append((row.place, first))
    return Deduplicated(tuple(kept), tuple(dropped))


def _normal(value: Any) -> Any:
    if isinstance(value, str):
        return normalised(value)
    if isinstance(value, Mapping):
        return {key: _normal(item) for key, item in value.items()}
    return [_normal(item) for item in value] if isinstance(value, list) else value
