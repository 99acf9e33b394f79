"""The documents of a corpus: read from files, told apart, and some of them held out."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loralab.config.pretrain import SourceConfig
from loralab.data.documents import Document as Text
from loralab.data.sources import SUFFIXES, Row, read_rows
from loralab.errors import UserError
from loralab.tasks.base import Split
from loralab.tasks.documents import LEAST_ANSWER
from loralab.tasks.splits import HUB_NAME, rows_of_split, text_field


@dataclass(frozen=True)
class Document:
    """A text to learn. prompt: what stands before it and is not learned; None for plain text.

    place: where it is from, for messages.
    """

    text: str
    place: str
    prompt: str | None = None

    @property
    def whole(self) -> str:
        return (self.prompt or "") + self.text


@dataclass(frozen=True)
class Source:
    """The documents of one source. repeated: those left out of `train` as they are held out too."""

    config: SourceConfig
    train: tuple[Document, ...]
    test: tuple[Document, ...]
    repeated: int = 0


def read_corpus(configs: Sequence[SourceConfig]) -> list[Source]:
    """All sources. A document that any source holds out is learned from none.

    Raises:
        UserError: nothing at a path, no text in it, or nothing left to train on.
    """
    read = [_read_source(config) for config in configs]
    held = {document.whole.strip() for source in read for document in source.test}
    sources = []
    for source in read:
        kept = tuple(d for d in source.train if d.whole.strip() not in held)
        if not kept:
            raise UserError(f"{source.config.path}: no document is left to train on")
        sources.append(Source(source.config, kept, source.test, len(source.train) - len(kept)))
    return sources


def texts_of_pairs(documents: Sequence[Document]) -> list[Text]:
    """Prompts and solutions as the texts of a contamination check, short solutions apart."""
    found = []
    for document in documents:
        found.append(Text(document.place, document.prompt or ""))
        if len(document.text.split()) >= LEAST_ANSWER:
            found.append(Text(document.place, document.text))
    return found


def _read_source(config: SourceConfig) -> Source:
    documents = _documents(config, config.path, "train")
    if config.test_path is not None:
        test = _documents(config, config.test_path, "test")
        return Source(config, tuple(documents), tuple(test))
    if not config.test_share:
        return Source(config, tuple(documents), ())
    if len(documents) == 1 and config.format == "text":
        documents = _halved(documents[0], config.test_share)
    held = max(1, round(config.test_share * len(documents)))
    if held >= len(documents):
        raise UserError(
            f"{config.path}: {len(documents)} documents cannot be split with test_share "
            f"{config.test_share:g}; give test_path, or test_share: 0"
        )
    return Source(config, tuple(documents[:-held]), tuple(documents[-held:]))


def _halved(document: Document, share: float) -> list[Document]:
    """One long document as two, cut at the end of a line near the share."""
    at = round(len(document.text) * (1 - share))
    at = document.text.rfind("\n", 0, at) + 1 or at
    parts = (document.text[:at], document.text[at:])
    return [Document(part, document.place) for part in parts if part.strip()]


def _documents(config: SourceConfig, path: str, split: Split) -> list[Document]:
    local = Path(path).expanduser()
    if not local.exists() and HUB_NAME.fullmatch(path):
        rows = rows_of_split(path, split, config.subset, config.limit)
        found = [_of_row(row, config) for row in rows]
    elif config.format == "pairs" or (local.is_file() and local.name.endswith(SUFFIXES)):
        found = [_of_row(row, config) for row in read_rows(path)]
    else:
        found = [d for file in _text_files(local, config.suffixes) for d in _of_text(file, config)]
    found = [document for document in found if document.text.strip()][: config.limit]
    if not found:
        raise UserError(f"{path}: holds no text")
    return found


def _of_row(row: Row, config: SourceConfig) -> Document:
    if config.format == "text":
        return Document(text_field(row, "text"), row.place)
    field = "solution" if "solution" in row.data else "completion"
    return Document(text_field(row, field), row.place, text_field(row, "prompt"))


def _text_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no such file or folder: {path}; check the path (now in {Path.cwd()})")
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and file.name.endswith(tuple(suffixes))
    )
    if not files:
        raise UserError(f"{path} holds no file that ends in {', '.join(suffixes)}")
    return files


def _of_text(file: Path, config: SourceConfig) -> list[Document]:
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.name.endswith(".gz") else data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: byte {error.start + 1}") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} cannot be read: {reason}") from error
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    parts = [text] if config.separator is None else text.split(config.separator)
    return [
        Document(part.strip("\n"), f"{file.name} document {number}")
        for number, part in enumerate(parts, 1)
    ]
