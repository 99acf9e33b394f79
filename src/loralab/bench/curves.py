"""How far the losses of one training are apart, by who trains and in which numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loralab.bench.command import Say
from loralab.bench.table import Cell, Section
from loralab.bench.work import Work
from loralab.bench.workers import Way, Worker, same_rows
from loralab.errors import UserError

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Curves:
    """Losses of each step by dtype and way."""

    losses: Mapping[str, Mapping[str, tuple[float, ...]]]

    def apart(self, name: str, dtype: str, reference: str) -> float:
        """Largest difference at one step from the reference way in float32."""
        exact = self.losses["float32"][reference]
        return max(abs(a - b) for a, b in zip(self.losses[dtype][name], exact, strict=True))


def measure(ways: Mapping[str, Way], work: Work, steps: int, say: Say = lambda _: None) -> Curves:
    """Train each way from the start in float32 and in bfloat16, one after the other.

    Raises:
        RuntimeError: a way ended, or trained on other rows than the first.
    """
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for dtype in DTYPES:
        laps = {}
        for name, way in ways.items():
            try:
                worker = Worker(way, replace(work, dtype=dtype, steps=steps))
            except UserError as error:
                say(f"{name}: skipped: {error}")
                continue
            try:
                laps[name] = (worker.lap(0, steps),)
            finally:
                worker.close()
            say(f"{name}, {dtype}: loss {laps[name][0].losses[-1]:.5f} after {steps} steps")
        same_rows(laps)
        found[dtype] = {name: lap.losses for name, (lap,) in laps.items()}
    return Curves(found)


def section(curves: Curves, ways: Mapping[str, Way], reference: str) -> Section:
    """The table; distances are from the reference way in float32."""
    rows: list[list[Cell]] = []
    for dtype, by_way in curves.losses.items():
        for name, losses in by_way.items():
            apart = curves.apart(name, dtype, reference)
            same = name == reference and dtype == "float32"
            rows.append(
                [
                    ways[name].label,
                    dtype,
                    f"{losses[0]:.5f}",
                    f"{losses[-1]:.5f}",
                    None if same else f"{apart:.2g}",
                ]
            )
    steps = len(next(iter(curves.losses["float32"].values())))
    intro = (
        f"{steps} steps from the same start, on the same rows in the same order. `apart`: largest "
        f"difference in loss at any step from {ways[reference].label} in float32."
    )
    return Section("Numerics", intro, ["way", "numbers", "first loss", "last loss", "apart"], rows)
