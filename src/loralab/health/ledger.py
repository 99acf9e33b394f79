"""What a guard saw, on disk as it sees it: readings.jsonl and findings.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab import durable
from loralab.health.findings import Finding
from loralab.health.reading import Reading

READINGS = "readings.jsonl"
FINDINGS = "findings.jsonl"


class Ledger:
    """Two files in a folder; None writes nowhere. Each line is on disk on return."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def resume(self, step: int) -> list[Reading]:
        """The readings before a step, from which a training goes on; later ones are forgotten.

        Of findings.jsonl only lines that came from a guard are: other parts of a run write there
        too.
        """
        if self._folder is None:
            return []
        rows = durable.read_lines(self._folder / READINGS)
        kept = [row for row in rows if row["step"] < step]
        self._rewrite(READINGS, rows, kept)
        found = durable.read_lines(self._folder / FINDINGS)
        ours = [not _of_a_guard(row) or row["step"] < step for row in found]
        self._rewrite(FINDINGS, found, [r for r, keep in zip(found, ours, strict=True) if keep])
        return [Reading.from_json(row) for row in kept]

    def add(self, reading: Reading) -> None:
        self._append(READINGS, [reading.to_json()])

    def report(self, findings: Sequence[Finding]) -> None:
        self._append(FINDINGS, [finding.to_json() for finding in findings])

    def _append(self, name: str, rows: list[Mapping[str, Any]]) -> None:
        if self._folder is not None:
            with durable.explain_os_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            durable.append_lines(self._folder / name, rows)

    def _rewrite(self, name: str, rows: Sequence[Any], kept: Sequence[Any]) -> None:
        if self._folder is not None and len(kept) < len(rows):
            durable.write_whole(
                self._folder / name, "".join(json.dumps(row) + "\n" for row in kept)
            )


def _of_a_guard(row: Mapping[str, Any]) -> bool:
    return "severity" in row and "step" in row
