"""The command line of `loralab bench resilience`, and its page.

Every case disturbs a whole `loralab run` of a small search (a random Llama, six generations, the
batched engine on one thread) in a process of its own, resumes it as a user would, and compares its
journal and its adapters, byte for byte, with those of the run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

from loralab.bench import command
from loralab.bench.command import Given, Say, check_counts
from loralab.bench.resilience.child import Launcher
from loralab.bench.resilience.damage import DAMAGES, INITIALISED, damages
from loralab.bench.resilience.disk import refusals, small_disk
from loralab.bench.resilience.kills import SUBJECTS, kills
from loralab.bench.resilience.rewards import rewards
from loralab.bench.resilience.rows import COLUMNS, Row
from loralab.bench.resilience.signals import (
    clock_jumps,
    terminated,
    terminated_twice,
    two_processes,
)
from loralab.bench.resilience.task import installed
from loralab.bench.resilience.world import SLOW, Scene, save_model
from loralab.bench.table import Section, Table
from loralab.errors import UserError

PAGE = Path("docs/resilience.md")
QUICK: dict[str, Any] = {"kills": 2, "trials": 1, "steps": 3}


@dataclass(frozen=True)
class Options:
    """kills: runs of each subject that is killed. trials: of every other case. steps: sizes of the
    disk and refused calls that are tried; None is all of them. only: cases, by name."""

    kills: int = 100
    trials: int = 10
    steps: int | None = None
    only: tuple[str, ...] = ()
    seed: int = 0


class World:
    """The model, the launcher, and scenes that are made when they are asked for."""

    def __init__(self, folder: Path, launcher: Launcher, options: Options, say: Say) -> None:
        self.folder, self.launcher, self.options, self.say = folder, launcher, options, say
        self._scenes: dict[str, Scene] = {}

    def scene(self, name: str = "plain", changes: Mapping[str, Any] | None = None) -> Scene:
        """The scene of that name, run undisturbed the first time."""
        if name not in self._scenes:
            self._scenes[name] = Scene.of(self.folder, self.launcher, name, **(changes or {}))
        return self._scenes[name]

    def random(self, name: str) -> Random:
        """A case's own draws, the same whichever cases run beside it."""
        return Random(f"{self.options.seed} {name}")


def _kills(world: World) -> Iterator[Row]:
    for make in SUBJECTS:
        subject = make()
        if "cluster" in subject.changes and find_spec("ray") is None:
            world.say(f"left out: {subject.label}: Ray is not installed")
            continue
        scene = world.scene(subject.name, subject.changes)
        random = world.random(subject.label)
        yield kills(subject, scene, world.options.kills, random, world.say)


def _disk(world: World) -> Iterator[Row]:
    yield small_disk(world.scene(), world.options.steps, world.say)
    yield refusals(world.scene(), world.options.steps, world.say)


def _damage(world: World) -> Iterator[Row]:
    for damage in DAMAGES:
        started = ("initialised", INITIALISED) if damage.initialised else ("plain", {})
        scene, random = world.scene(*started), world.random(damage.label)
        yield damages(damage, scene, world.options.trials, random, world.say)


def _signals(world: World) -> Iterator[Row]:
    scene, trials = world.scene("slow", SLOW), world.options.trials
    for case in (terminated, terminated_twice):
        yield case(scene, trials, world.random(case.__name__), world.say)


def _beside(world: World) -> Iterator[Row]:
    for case in (two_processes, clock_jumps):
        random = world.random(case.__name__)
        yield case(world.scene(), world.options.trials, random, world.say)


def _rewards(world: World) -> Iterator[Row]:
    yield from rewards(world.folder, world.launcher, world.options.trials, world.say)


CASES: Mapping[str, tuple[str, Callable[[World], Iterator[Row]]]] = {
    "kills": ("Killed", _kills),
    "disk": ("A full disk", _disk),
    "damage": ("Damaged files", _damage),
    "signals": ("Signals", _signals),
    "beside": ("A second process, and the clock", _beside),
    "rewards": ("Rewards that misbehave", _rewards),
}


def run(options: Options, say: Say = print, page: Path = PAGE) -> Table:
    """Run the cases. Those of a page that are not run again keep what they came to.

    Raises:
        UserError: an option, or an undisturbed run that fails.
    """
    check_counts(options)
    unknown = [name for name in options.only if name not in CASES]
    if unknown:
        raise UserError(f"--only {unknown[0]}: expected some of {', '.join(CASES)}")
    done = _done(page) if options.only else {}
    with tempfile.TemporaryDirectory(prefix="loralab-resilience-") as name:
        folder = Path(name)
        save_model(folder)
        path = str(installed(folder / "site"))
        with Launcher(folder, {"PYTHONPATH": path}) as launcher:
            world = World(folder, launcher, options, say)
            for case in options.only or CASES:
                began = monotonic()
                rows = []
                for row in CASES[case][1](world):
                    rows.append({"cells": row.cells(), "trials": list(map(asdict, row.trials))})
                    say(" | ".join(map(str, row.cells())))
                seconds = round(monotonic() - began)
                done[case] = {"rows": rows, "seconds": seconds, "date": date.today().isoformat()}
    return _table(options, {case: done[case] for case in CASES if case in done})


def _table(options: Options, done: Mapping[str, Any]) -> Table:
    sections = [
        Section(
            CASES[case][0],
            f"{found['date']}, {found['seconds']} s.",
            COLUMNS,
            [row["cells"] for row in found["rows"]],
        )
        for case, found in done.items()
    ]
    trials = [trial for found in done.values() for row in found["rows"] for trial in row["trials"]]
    asked = [trial["identical"] for trial in trials if trial["identical"] is not None]
    facts = command.facts("torch", "transformers", "ray")
    facts["survived"] = f"{sum(trial['survived'] for trial in trials)} of {len(trials)} trials"
    facts["bit-identical"] = f"{sum(asked)} of {len(asked)}"
    data = {"options": asdict(options), "cases": done}
    return Table("What a run survives", facts, sections, data)


def _done(page: Path) -> dict[str, Any]:
    """What the cases of a page came to, by name; {} without one."""
    try:
        loaded = json.loads(page.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return {}
    cases: dict[str, Any] = loaded.get("cases", {})
    return cases


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(prog="loralab bench resilience", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few trials of each case: does it all run?")
    add("--kills", type=int, help=f"runs of each subject, default {default.kills}")
    add("--trials", type=int, help=f"of every other case, default {default.trials}")
    add("--steps", type=int, help="sizes of the disk and refused calls, default all of them")
    add("--only", nargs="+", metavar="CASE", help=f"of {', '.join(CASES)}; others are kept")
    add("--seed", type=int)
    add("--out", type=Path, help=f"page to write, default {PAGE} (none with --quick)")
    add("--json", type=Path, help="write the raw trials there and no page")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when measured, 2 for what the user can mend."""

    def measured(given: Given, say: Say) -> Table:
        return run(Options(**given), say)

    return command.main(_parser(), argv, PAGE, measured, QUICK)
