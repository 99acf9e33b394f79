"""What a guard sees, sent to the trackers that a training reports to (`report_to`).

A callback cannot add to what a Trainer sends: each tracker is spoken to in its own words, under
names that begin with "guard/".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from loralab.health.findings import Finding
from loralab.health.reading import Reading
from loralab.health.telling import as_markdown, texts_as_markdown

CONSTANT = ("base.", "data.", "setup.")
"""Beginnings of values that are left out: much the same at each look."""
_TEXTS = ("step", "prompt", "writes", "base")
_FINDINGS = ("step", "severity", "rule", "what", "cause", "advice")


class Tracker(Protocol):
    def look(self, reading: Reading, numbers: Mapping[str, float]) -> None:
        """The numbers and texts of a look."""
        ...

    def found(self, step: int, findings: Sequence[Finding]) -> None:
        """What a look was the first to find."""
        ...

    def close(self) -> None: ...


class Trackers:
    """Those of a training that are known here: tensorboard, wandb, trackio.

    names: of `report_to`; what is not known is passed over. folder: the training's output_dir.
    tell: is given a line where a tracker fails, which is left out from then on: a training does
    not end of it.
    """

    def __init__(self, names: Sequence[str], folder: Path, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._all: dict[str, Tracker] = {}
        for name in names:
            if name in _KNOWN:
                with self._forgiven(name):
                    self._all[name] = _KNOWN[name](folder)

    def look(self, reading: Reading, found: Sequence[Finding], fresh: Sequence[Finding]) -> None:
        """A look's numbers and texts, how much was found, and what was found newly."""
        numbers = {
            f"guard/{name}": value
            for name, value in reading.values.items()
            if isfinite(value) and not name.startswith(CONSTANT)
        }
        for severity in ("fail", "warn"):
            count = sum(one.severity == severity for one in found)
            numbers[f"guard/findings.{severity}"] = float(count)
        self._each(lambda tracker: tracker.look(reading, numbers))
        if fresh:
            self._each(lambda tracker: tracker.found(reading.step, fresh))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._all.clear()

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._all.items()):
            with self._forgiven(name):
                do(tracker)

    @contextmanager
    def _forgiven(self, name: str) -> Iterator[None]:
        # Another package's errors, of a network, a server or a version, can be anything.
        try:
            yield
        except Exception as error:
            self._all.pop(name, None)
            self._tell(f"guard: {name} is told no more: {type(error).__name__}: {error}")


class TensorBoard:
    """In a folder of its own within the run's: TensorBoard follows one file a folder."""

    def __init__(self, folder: Path) -> None:
        place = os.environ.get("TENSORBOARD_LOGGING_DIR")
        begun = sorted((folder / "runs").glob("*/"), key=lambda path: path.stat().st_mtime)
        run = Path(place).expanduser() if place else (begun or [folder / "runs"])[-1]
        self._writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(
            log_dir=str(run / "guard")
        )

    def look(self, reading: Reading, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, reading.step)
        if reading.examples:
            texts = texts_as_markdown(reading.examples)
            self._writer.add_text("guard/texts", texts, reading.step)
        self._writer.flush()

    def found(self, step: int, findings: Sequence[Finding]) -> None:
        text = "\n\n".join(map(as_markdown, findings))
        self._writer.add_text("guard/findings", text, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Dashboard:
    """Weights & Biases, or Trackio, which has the same interface: tables that grow by a look each
    time, and an alert for each finding."""

    def __init__(self, package: str) -> None:
        self._package: Any = import_module(package)
        self._texts: list[list[Any]] = []
        self._findings: list[list[Any]] = []

    def look(self, reading: Reading, numbers: Mapping[str, float]) -> None:
        row: dict[str, Any] = dict(numbers)
        if reading.examples:
            self._texts += [
                [reading.step, one.prompt, one.completion, one.base] for one in reading.examples
            ]
            row["guard/texts"] = self._table(_TEXTS, self._texts)
        self._log(reading.step, row)

    def found(self, step: int, findings: Sequence[Finding]) -> None:
        self._findings += [
            [one.step, one.severity, one.rule, one.message, one.cause, one.advice]
            for one in findings
        ]
        self._log(step, {"guard/findings": self._table(_FINDINGS, self._findings)})
        levels = self._package.AlertLevel
        for one in findings:
            self._package.alert(
                title=f"{one.rule} {one.severity}s",
                text=f"step {one.step}: {one.message}. {one.cause}: {one.advice}",
                level=levels.ERROR if one.severity == "fail" else levels.WARN,
            )

    def close(self) -> None:
        """The run is its owner's to finish."""

    def _log(self, step: int, row: Mapping[str, Any]) -> None:
        # The axis of what the Trainer sends itself.
        self._package.log({**row, "train/global_step": step})

    def _table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
        return self._package.Table(columns=list(columns), data=[list(row) for row in rows])


_KNOWN: Mapping[str, Callable[[Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda folder: Dashboard("wandb"),
    "trackio": lambda folder: Dashboard("trackio"),
}
