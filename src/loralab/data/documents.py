"""What data tools compare: a row's text, and where it stands."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.data.sources import Row

IDENTITIES = ("id", "task_id", "idx", "index")
"""Columns that name a row and say nothing of what is in it."""

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Document:
    """One row as text. place: the file and line, or a task's example."""

    place: str
    text: str


def document(row: Row) -> Document:
    """All text of a row, its columns in order, identities apart."""
    return Document(row.place, "\n".join(_texts(content(row))))


def content(row: Row) -> dict[str, Any]:
    """A row's columns without those that only name it."""
    return {key: value for key, value in row.data.items() if key not in IDENTITIES}


def normalised(text: str) -> str:
    """Text without what does not change its meaning: case, kinds of space and of character."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", text)).strip().casefold()


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        # A turn's role is the same in every row.
        return [text for key, item in value.items() if key != "role" for text in _texts(item)]
    if isinstance(value, Sequence):
        return [text for item in value for text in _texts(item)]
    return []
