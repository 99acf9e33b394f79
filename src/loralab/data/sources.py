"""Rows from a path: .json, .jsonl, .tsv (each also .gz), .parquet, or a folder of such files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import UserError

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet", ".tsv", ".tsv.gz")


@dataclass(frozen=True)
class Row:
    """One record, and where it stands so that an error can name the place.

    place: "train.jsonl line 7", "train.json row 3" or "train.parquet row 3", all from 1.
    """

    data: dict[str, Any]
    place: str


def read_rows(path: str | Path, columns: Sequence[str] | None = None) -> list[Row]:
    """All rows of a file, or of the data files of a folder in order of their names.

    A .json file holds an array of objects, or one object a line as .jsonl does. A .tsv file names
    its columns in its first line; its values are text, without quotes or escapes. `columns` limits
    what is read of a Parquet file to those of these columns that it has (others may be large).

    Raises:
        UserError: no such path, no data in it, or a row that is not an object, with its line.
    """
    return list(iter_rows(path, columns))


def iter_rows(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """As `read_rows`, one at a time. The path is checked at once, rows as they come."""
    return _rows_of(data_files(path), columns)


def data_files(path: str | Path) -> list[Path]:
    """The data file at a path, or those directly in a folder, sorted by name.

    Raises:
        UserError: nothing there that can be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and _suffix(p))
        if not files:
            raise UserError(f"{path} holds no data file: expected {', '.join(SUFFIXES)}")
        return files
    if not path.exists():
        raise UserError(f"no such file or folder: {path}; check the path (now in {Path.cwd()})")
    if not _suffix(path):
        raise UserError(f"{path.name} is not a data file: expected {', '.join(SUFFIXES)}")
    return [path]


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s) and not name.startswith(".")), None)


def _rows_of(files: list[Path], columns: Sequence[str] | None) -> Iterator[Row]:
    for file in files:
        empty = True
        for row in _read_parquet(file, columns) if _suffix(file) == ".parquet" else _read(file):
            empty = False
            yield row
        if empty:
            raise UserError(f"{file} holds no rows")


def _read(file: Path) -> Iterator[Row]:
    lines = _lines(file)
    if (_suffix(file) or "").startswith(".tsv"):
        yield from _table(file, lines)
        return
    if not (_suffix(file) or "").startswith(".jsonl"):
        text = "\n".join(line for _, line in lines)
        if text.lstrip("\ufeff \t\r\n").startswith("["):
            yield from _array(file, text)
            return
        lines = enumerate(text.split("\n"), 1)
    for number, line in lines:
        line = line.removeprefix("\ufeff") if number == 1 else line
        if line.strip():
            place = f"{file.name} line {number}"
            yield Row(_record(_parse(line, place), place), place)


def _array(file: Path, text: str) -> Iterator[Row]:
    for number, record in enumerate(_parse(text.removeprefix("\ufeff"), file.name), 1):
        place = f"{file.name} row {number}"
        yield Row(_record(record, place), place)


def _table(file: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    columns: list[str] = []
    for number, line in lines:
        values = line.removeprefix("\ufeff").split("\t") if number == 1 else line.split("\t")
        place = f"{file.name} line {number}"
        if number == 1:
            columns = values
        elif line and len(values) != len(columns):
            raise UserError(
                f"{place} has {len(values)} values, the first line names {len(columns)} columns"
            )
        elif line:
            yield Row(dict(zip(columns, values, strict=True)), place)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, split at "\\n" alone: JSON text may hold U+2028 and its like as it is."""
    number = 0
    try:
        with gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.name} line {number} is not UTF-8 text: byte {error.start + 1}"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} cannot be read after line {number}: {reason}") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(
            f"{place}{line} is not JSON: {error.msg} at column {error.colno}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{place} is not a record: JSON nested too deep") from error
    except ValueError as error:
        raise UserError(f"{place} is not JSON that can be read: {error}") from error


def _record(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise UserError(f"{place} is {type(value).__name__}, expected an object: {{...}}")


def _read_parquet(file: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    # pyarrow takes a quarter of a second to import, and most runs read no Parquet.
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            wanted = None
            if columns is not None:
                wanted = [name for name in table.schema_arrow.names if name in columns]
            for batch in table.iter_batches(columns=wanted):
                for data in batch.to_pylist():
                    number += 1
                    yield Row(data, f"{file.name} row {number}")
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} cannot be read as Parquet after row {number}: {reason}") from error
