"""Where the time of a run goes: seconds and calls by phase, continued when a run is resumed.

    timings = Timings.load(run.timings_path)
    with timings.phase("total_experiment"):
        with timings.phase("evaluation"):
            ...
    timings.save(run.timings_path)

`total_experiment` is the whole. Of the other phases, one opened inside another takes its time
away from the outer one, so that shares add up to at most 100 %.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from loralab.durable import write_whole
from loralab.errors import UserError

TOTAL = "total_experiment"
OTHER = "other"
ONE_TIME = frozenset({"weight_analysis", "init_population", "server_launch", TOTAL})
"""Phases that happen once a run; every other one happens each generation."""


class Row(NamedTuple):
    """One line of the table. percent: of the total, 0 to 100."""

    name: str
    seconds: float
    percent: float
    calls: int


class Timings:
    """Seconds and calls by phase. Not for use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._open: list[list[Any]] = []  # [name, started at, seconds spent in inner phases]

    @classmethod
    @contextmanager
    def of_run(cls, path: Path) -> Iterator[Timings]:
        """The timings kept at `path`, the block counted as the whole, and saved however it ends."""
        timings = cls.load(path)
        try:
            with timings.phase(TOTAL):
                yield timings
        finally:
            timings.save(path)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`, also when it raises."""
        if any(frame[0] == name for frame in self._open):
            raise RuntimeError(f"phase {name!r} is already running")
        frame: list[Any] = [name, self._clock(), 0.0]
        self._open.append(frame)
        try:
            yield
        finally:
            self._open.pop()
            elapsed = self._clock() - frame[1]
            self._add(name, elapsed if name == TOTAL else elapsed - frame[2])
            if self._open:
                self._open[-1][2] += elapsed

    def seconds(self, name: str) -> float:
        """Seconds counted under `name`, the running block included."""
        return float(self.to_dict().get(name, {}).get("seconds", 0.0))

    def to_dict(self) -> dict[str, dict[str, float]]:
        """{phase: {"seconds", "calls"}}; running phases count up to now."""
        seconds, calls = dict(self._seconds), dict(self._calls)
        now, inner = self._clock(), 0.0
        for name, started, nested in reversed(self._open):
            spent = now - started if name == TOTAL else now - started - nested - inner
            seconds[name] = seconds.get(name, 0.0) + spent
            calls[name] = calls.get(name, 0) + 1
            inner = now - started
        return {name: {"seconds": seconds[name], "calls": calls[name]} for name in seconds}

    def save(self, path: Path) -> None:
        """Write `to_dict` as JSON, atomically."""
        write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Timings:
        """Timings that go on from those saved at `path`; empty ones if there is no file.

        Raises:
            UserError: the file is not one that `save` wrote.
        """
        timings = cls()
        try:
            saved = json.loads(path.read_bytes())
            for name, entry in saved.items():
                timings._add(str(name), float(entry["seconds"]), int(entry["calls"]))
        except FileNotFoundError:
            pass
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a file of timings; delete it to count anew") from error
        return timings

    def table(self) -> list[Row]:
        """Rows by falling time: the total first, `other` for what no phase accounts for."""
        entries = self.to_dict()
        known = sum(entry["seconds"] for name, entry in entries.items() if name != TOTAL)
        total = max(entries.get(TOTAL, {"seconds": 0.0})["seconds"], known)
        rows = [
            Row(name, entry["seconds"], _percent(entry["seconds"], total), int(entry["calls"]))
            for name, entry in entries.items()
        ]
        if TOTAL in entries and total > known:
            rows.append(Row(OTHER, total - known, _percent(total - known, total), 0))
        return sorted(rows, key=lambda row: (row.name != TOTAL, -row.seconds, row.name))

    def _add(self, name: str, seconds: float, calls: int = 1) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._calls[name] = self._calls.get(name, 0) + calls


def _percent(part: float, whole: float) -> float:
    return 100.0 * part / whole if whole > 0 else 0.0
