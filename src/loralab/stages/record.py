"""A pipeline's journal: which directory holds which stage, made from what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab import durable
from loralab.run import Run


@dataclass(frozen=True)
class Entry:
    """A directory that a stage began in. complete: whether it ran to its end."""

    stage: str
    directory: str
    digest: str
    complete: bool = False


class Record:
    """The journal of a pipeline's run. The newest line about a directory is what counts."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._entries: dict[str, Entry] = {}
        for row in durable.read_lines(run.journal_path):
            self._take(row)

    def place(self, stage: str, digest: str) -> Entry:
        """Where the stage with this digest is, or is to be made: never in a directory that holds
        another's results."""
        for entry in self._entries.values():
            if (entry.stage, entry.digest) == (stage, digest):
                there = (self._run.path / entry.directory / "config.yaml").exists()
                return Entry(stage, entry.directory, digest, entry.complete and there)
        number, name = 1, stage
        while (self._run.path / name).exists():
            number += 1
            name = f"{stage}-{number}"
        return Entry(stage, name, digest)

    def began(self, entry: Entry, inputs: Mapping[str, Any]) -> None:
        """Note it before the stage writes anything."""
        self._add(entry, {"event": "began", "inputs": dict(inputs)})

    def finished(self, entry: Entry) -> None:
        """Note that it ran to its end."""
        self._add(entry, {"event": "finished"})

    def _add(self, entry: Entry, more: Mapping[str, Any]) -> None:
        row = {"stage": entry.stage, "directory": entry.directory, "digest": entry.digest, **more}
        durable.append_line(self._run.journal_path, row)
        self._take(row)

    def _take(self, row: Mapping[str, Any]) -> None:
        name = str(row["directory"])
        complete = row["event"] == "finished"
        self._entries[name] = Entry(str(row["stage"]), name, str(row["digest"]), complete)


def directory_of(run: Run, entry: Entry) -> Path:
    """Its path, absolute: a stage's config then means the same from whatever folder it is resumed.
    A pipeline that is moved keeps what is done; a stage in the middle has to be where it began."""
    return (run.path / entry.directory).resolve()
