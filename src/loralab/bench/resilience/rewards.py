"""Rewards that misbehave on some completions: those count as failed, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loralab import durable
from loralab.bench.resilience.child import Launcher
from loralab.bench.resilience.rows import Row, Trial
from loralab.bench.resilience.task import FAULTS, NAME, NEEDS_A_DEADLINE, Fault
from loralab.bench.resilience.world import Scene
from loralab.errors import UserError
from loralab.tasks.conciseness import Conciseness

DEADLINE = 4.0
"""Seconds for one completion, where a reward hangs."""
_SHARE = 0.12
"""Of all texts, those on which the reward misbehaves."""


def rewards(
    folder: Path, launcher: Launcher, trials: int, say: Callable[[str], None]
) -> Iterator[Row]:
    """A row a fault, then one of runs that stop as too much fails."""
    for fault in FAULTS:
        yield Row(_label(fault), [_goes_on(folder, launcher, fault, n, say) for n in range(trials)])
    yield Row(
        "more fails than `scoring.max_failed`",
        [_stops(folder, launcher, n, say) for n in range(trials)],
    )


def _label(fault: Fault) -> str:
    said = {
        "raises": "a reward that raises",
        "exits": "a reward that calls `sys.exit`",
        "nan": "a reward that is NaN",
        "string": "a reward that is a string",
        "huge": "a reward of 1e308",
        "hangs": "a reward that sleeps for ever",
        "hangs_in_c": "a reward that hangs in C code",
        "dies": "a reward that kills its process",
    }
    return said[fault]


def _changes(fault: Fault, seed: int, most: float = 1.0) -> dict[str, Any]:
    scoring: dict[str, Any] | None = None
    if fault in NEEDS_A_DEADLINE or most < 1:
        scoring = {"deadline": DEADLINE, "workers": 2, "max_failed": most}
    task = {"name": NAME, "options": {"fault": fault, "share": _SHARE}}
    return {"task": task, "scoring": scoring, "seed": seed}


def _goes_on(
    folder: Path, launcher: Launcher, fault: Fault, seed: int, say: Callable[[str], None]
) -> Trial:
    """Two runs that end the same, with failures counted and at the floor."""
    try:
        scene = Scene.of(folder, launcher, f"{fault}-{seed}", **_changes(fault, seed))
    except UserError as error:
        say(f"{fault}: {error}")
        return Trial(False, False, "", str(error))
    rows = durable.read_lines(scene.reference / "metrics.jsonl")
    failed = sum(row.get("failed", 0) for row in rows)
    texts = durable.read_lines(scene.reference / "completions.jsonl")
    told = [row for row in texts if row["failed"]]
    floor = Conciseness().reward_floor
    good = failed > 0 and all(row["reward"] == floor for row in told)
    wrong = None if good else f"{failed} failed, {len(told)} of those shown, not all at {floor}"
    if wrong:
        say(f"{fault}: {wrong}")
    return Trial(wrong is None, True, str(told[0]["failed"]) if told else "", wrong)


def _stops(folder: Path, launcher: Launcher, seed: int, say: Callable[[str], None]) -> Trial:
    """A run that stops with one line where not one completion may fail."""
    scene = Scene.planned(folder, launcher, f"stopped-{seed}", **_changes("raises", seed, most=0.0))
    child = scene.start(scene.reference)
    code = child.ended()
    good = code == 2 and "could not be scored, more than scoring.max_failed" in child.error
    if not good:
        say(f"max_failed: exit code {code}: {child.error}")
    return Trial(good, None, child.error, None if good else f"exit code {code}: {child.said}")
