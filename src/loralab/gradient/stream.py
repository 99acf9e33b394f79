"""Documents as rows of tokens, held as flat arrays and cut when they are asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
from torch.utils.data import Dataset

from loralab.errors import UserError
from loralab.gradient.collate import as_record
from loralab.gradient.corpus import Document, Source
from loralab.gradient.rows import Row, pack, prepare

_BATCH = 1024
"""Documents given to the tokenizer at a time."""


class TextRows(Sequence[Row]):
    """Rows of plain text: BOS, tokens and EOS of one document after the other.

    length: tokens of a row. packed: rows are cut from the documents laid end to end, the rest of a
    document goes on in the next row as a sequence of its own; else every document begins a row.
    """

    def __init__(
        self, documents: Sequence[Document], tokenizer: Any, length: int, packed: bool
    ) -> None:
        parts: list[np.ndarray[Any, np.dtype[np.uint32]]] = []
        for at in range(0, len(documents), _BATCH):
            texts = [document.whole for document in documents[at : at + _BATCH]]
            for ids in encode(texts, tokenizer):
                whole = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
                parts.append(np.array([token for token in whole if token is not None], np.uint32))
        self._ids = np.concatenate(parts)
        self._borders = np.cumsum([0, *(len(part) for part in parts)])
        if packed:
            starts = np.arange(0, len(self._ids), length)
        else:
            starts = np.concatenate(
                [
                    np.arange(a, b, length)
                    for a, b in zip(self._borders, self._borders[1:], strict=False)
                ]
            )
        ends = np.append(starts[1:], len(self._ids))
        # The last token of a document may have fallen alone into a row: nothing is predicted there.
        wide = ends - starts > 1
        self.tokens = int((ends - starts)[wide].sum())
        """In all rows."""
        inner = np.setdiff1d(self._borders[1:-1], starts)
        self.learned = self.tokens - int(wide.sum()) - len(inner)
        """Those that are predicted: all but the first of each sequence."""
        self._starts, self._ends = starts[wide], ends[wide]

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start, end = int(self._starts[index]), int(self._ends[index])
        first = np.searchsorted(self._borders, start, side="right")
        inside = self._borders[first : np.searchsorted(self._borders, end)]
        lengths = np.diff(np.concatenate([[start], inside, [end]]))
        ids = tuple(self._ids[start:end].tolist())
        return Row(ids, ids, tuple(lengths.tolist()))


def encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of texts, without special tokens: one that a text spells out is its letters."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def rows_of(
    source: Source,
    documents: Sequence[Document],
    tokenizer: Any,
    length: int,
    packed: bool,
    said: Callable[[str], None] | None = None,
) -> Sequence[Row]:
    """Rows of a source's documents in their order.

    said: is told of pairs that lose their end to the length, and their end token with it.

    Raises:
        UserError: a pair's prompt alone fills a row.
    """
    if source.config.format == "text":
        return TextRows(documents, tokenizer, length, packed)
    pairs = [(document.prompt or "", document.text, document.place) for document in documents]
    prepared = prepare(pairs, tokenizer, length)
    rows = prepared.rows
    if prepared.cut and said is not None:
        said(
            f"{source.config.path}: {prepared.cut} of {len(rows)} pairs are longer than "
            f"training.max_length {length} and lose their end, end token included"
        )
    return pack(rows, length) if packed else rows


class Mixture(Dataset):  # type: ignore[type-arg]
    """Rows of all sources, as many of each as its weight says, in an order the seed decides.

    One pass has as many rows as the sources have together; a source whose share is larger than
    itself is seen again from its beginning, one whose share is smaller shows its first rows.
    As a dataset it gives records (see `collate.as_record`).
    """

    def __init__(self, sources: Sequence[Sequence[Row]], weights: Sequence[float | None]) -> None:
        self._sources = sources
        total = sum(map(len, sources))
        if not total:
            raise UserError("the corpus has no row of two tokens or more")
        given = [w for w in weights if w is not None]
        counts = [
            len(rows) if weight is None else max(1, round(total * weight / sum(given)))
            for rows, weight in zip(sources, weights, strict=True)
        ]
        self._places = [
            (which, i % len(sources[which])) for which, count in enumerate(counts)
            for i in range(count if len(sources[which]) else 0)
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int) -> Row:
        """One row."""
        which, at = self._places[index]
        return self._sources[which][at]

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return as_record(self.row(index))


def shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """The documents in another order, so that rows cut from them hold unlike neighbours."""
    mixed = list(documents)
    random.Random(seed).shuffle(mixed)
    return mixed


def token_counts(rows: Sequence[Row]) -> tuple[int, int]:
    """Tokens in all rows, and those of them that are learned."""
    if isinstance(rows, TextRows):
        return rows.tokens, rows.learned
    return sum(len(row.input_ids) for row in rows), sum(row.learned for row in rows)
