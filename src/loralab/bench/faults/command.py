"""`loralab bench faults`: run what is missing of a set of runs, judge all there is, write the page.

A run is a file of WORK/runs; killed at any moment, the benchmark goes on with the first that is
missing. Judging reads the files alone: `--table-only` does it again under today's rules.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from loralab import durable
from loralab.bench.faults.faults import FAULTS
from loralab.bench.faults.healthy import CONTROLS, SETUPS
from loralab.bench.faults.plan import Fault, Plan
from loralab.bench.faults.tasks import KINDS, Small
from loralab.errors import UserError
from loralab.yaml import parse_yaml

PAGE = Path("docs/faults.md")
CONFIGS = Path("benchmarks/faults")
_QUICK_STEPS = 10


@dataclass(frozen=True)
class Item:
    """One run to be done. kind: "fault", "control" or "healthy", which faults are set beside."""

    kind: str
    name: str
    world: str
    task: str
    seed: int

    @property
    def path(self) -> Path:
        return Path(self.world) / self.task / f"{self.kind}-{self.name}-{self.seed}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, run, judge, write the page and its JSON."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(given)
    work = Path(options.work) / ("quick" if options.quick else options.chosen)
    wanted = items(settings(options), options)
    if options.plan:
        print("\n".join(reckoned(wanted, work)))
        return 0
    if options.margins:
        from loralab.bench.faults.margins import margins

        print(margins(read(wanted, work)).markdown())
        return 0
    if not options.table_only:
        if options.stories is None:
            raise UserError("bench faults: --stories is missing; expected a file of TinyStories")
        _run(wanted, options, work)
    from loralab.bench.faults.page import page

    made = page(read(wanted, work), f"`loralab bench faults {_shown(given)}`", options.chosen)
    if options.quick:
        print(made.markdown())
    else:
        made.write(Path(options.page))
        print(f"{options.page}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="loralab bench faults", description=__doc__)
    add = made.add_argument
    add("--set", choices=("development", "unseen"), default="development", dest="chosen")
    add("--config", metavar="FILE", help=f"the set's runs; default {CONFIGS}/SET.yaml")
    add("--stories", metavar="PATH", help="TinyStories, a text file or a hub name; runs need it")
    add("--only", metavar="A,B", help="names of faults and controls")
    add("--seeds", metavar="0,1", help="instead of the set's")
    add("--worlds", metavar="small,smollm2", help="instead of the set's")
    add(
        "--quick",
        action="store_true",
        help="few steps of a smaller decoder, one seed, one task: printed",
    )
    add("--work", default="runs/bench-faults", metavar="DIR")
    add("--page", default=str(PAGE), metavar="FILE")
    add("--plan", action="store_true", help="say what is to be run and how long it takes; run none")
    add("--table-only", action="store_true", help="judge the runs that are there; run none")
    add("--margins", action="store_true", help="how near healthy runs come to each limit; run none")
    return made


def items(given: Mapping[str, Any], options: Any) -> list[Item]:
    """All runs of a set: what faults are set beside first, so that a part can be judged."""
    only = None if options.only is None else set(options.only.split(","))
    known = {fault.name for fault in FAULTS} | {control.name for control in CONTROLS}
    if only is not None and (strange := sorted(only - known)):
        raise UserError(f"--only: no fault or control {strange[0]!r}; known: {', '.join(known)}")
    worlds = given["worlds"]
    if options.worlds is not None:
        worlds = {name: worlds[name] for name in options.worlds.split(",")}
    found: dict[Item, None] = {}
    for world, wanted in worlds.items():
        seeds = wanted["seeds"]
        if options.seeds is not None:
            seeds = [int(seed) for seed in options.seeds.split(",")]
        if options.quick:
            seeds, wanted = seeds[:1], {**wanted, "tasks_each": 1}
        for seed in seeds:
            for fault, task in _pairs(FAULTS, wanted, wanted.get("faults"), only, seed):
                task = _plan_of(fault.setup).task or task
                found[Item("healthy", fault.setup, world, task, seed)] = None
                found[Item("fault", fault.name, world, task, seed)] = None
            for control, task in _pairs(CONTROLS, wanted, wanted.get("controls"), only, seed):
                plan = Plan()
                control.change(plan)
                found[Item("control", control.name, world, plan.task or task, seed)] = None
    return sorted(found, key=lambda item: ("healthy", "fault", "control").index(item.kind))


def _pairs(
    table: Sequence[Any],
    wanted: Mapping[str, Any],
    names: Sequence[str] | None,
    only: set[str] | None,
    seed: int,
) -> Iterator[tuple[Any, str]]:
    """Each with its tasks, in turn, so that seeds and neighbours see different ones."""
    tasks, each = wanted["tasks"], wanted["tasks_each"]
    for number, one in enumerate(table):
        if (names is None or one.name in names) and (only is None or one.name in only):
            for step in range(min(each, len(tasks))):
                yield one, tasks[(number + seed * each + step) % len(tasks)]


def _plan_of(setup: str) -> Plan:
    plan = Plan()
    SETUPS[setup](plan)
    return plan


def plan_of(item: Item, settings: Mapping[str, Any] | None = None, quick: bool = False) -> Plan:
    """What an item's run does. settings: of its world: steps, lr and so on."""
    plan = Plan(**dict(settings or {}))
    if quick:
        plan.steps = _QUICK_STEPS
    if item.kind == "control":
        next(one for one in CONTROLS if one.name == item.name).change(plan)
    else:
        fault = fault_of(item.name) if item.kind == "fault" else None
        SETUPS[item.name if fault is None else fault.setup](plan)
        if fault is not None:
            fault.change(plan)
    if quick and plan.search is not None:
        plan.search["generations"] = 4
    return plan


def fault_of(name: str) -> Fault:
    return next(one for one in FAULTS if one.name == name)


def _run(wanted: Sequence[Item], options: Any, work: Path) -> None:
    from loralab.bench.faults.trial import run_trial
    from loralab.bench.faults.world import Making, World, read_stories, small_world

    asked = settings(options)
    stories = read_stories(options.stories)
    making = Making(hidden=64, layers=2, steps=100) if options.quick else Making()
    folder = work if options.quick else Path(options.work)
    worlds: dict[str, World] = {}
    todo = [item for item in wanted if not (work / "runs" / item.path).is_file()]
    for number, item in enumerate(todo, 1):
        if item.world not in worlds:
            worlds[item.world] = (
                small_world(folder, stories, making)
                if item.world == "small"
                else World(item.world, item.world, stories)
            )
        own = asked["worlds"][item.world].get("plan")
        plan = plan_of(item, own, options.quick)
        began = time.perf_counter()
        try:
            record = run_trial(plan, Small(item.task, item.seed), worlds[item.world], item.seed)
        except Exception as error:
            # A benchmark of broken runs goes on past one that breaks off; the page names it.
            record = {"error": f"{type(error).__name__}: {error}"}
        record["seconds"] = time.perf_counter() - began
        place = work / "runs" / item.path
        place.parent.mkdir(parents=True, exist_ok=True)
        durable.write_whole(place, json.dumps(plain({**vars(item), **record})) + "\n")
        told = record.get("error") or f"score {record['used']['score']:.2f}"
        print(
            f"{number} of {len(todo)}: {item.path}: {told}, {record['seconds']:.0f} s", flush=True
        )


def read(wanted: Sequence[Item], work: Path) -> dict[Item, dict[str, Any]]:
    """The runs that are there."""
    found = {}
    for item in wanted:
        place = work / "runs" / item.path
        if place.is_file():
            found[item] = json.loads(place.read_text(encoding="utf-8"))
    return found


def reckoned(wanted: Sequence[Item], work: Path) -> Iterator[str]:
    """How many runs are missing, and the hours they take if they take what such runs took."""
    done = read(wanted, work)
    hours = 0.0
    for world in dict.fromkeys(item.world for item in wanted):
        mine = [item for item in wanted if item.world == world]
        took = [float(done[item]["seconds"]) for item in mine if item in done]
        left = len(mine) - len(took)
        each = fmean(took) if took else None
        yield (
            f"{world}: {len(mine)} runs, {left} missing, "
            + (f"{each:.0f} s each so far" if each is not None else "none timed yet")
        )
        for kind in ("healthy", "fault", "control"):
            yield f"  {kind}: {sum(item.kind == kind for item in mine)}"
        hours += left * (each or 0.0) / 3600
    yield f"reckoned: {hours:.1f} hours"


def settings(options: Any) -> dict[str, Any]:
    """What the set's file says.

    Raises:
        UserError: no such file, or a task that there is not.
    """
    path = Path(options.config) if options.config else CONFIGS / f"{options.chosen}.yaml"
    if not path.is_file():
        raise UserError(f"bench faults: no {path}; run in the repository, or give --config FILE")
    made: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    for world in made["worlds"].values():
        for task in world["tasks"]:
            if task not in KINDS:
                raise UserError(f"{path}: task {task!r}; known: {', '.join(KINDS)}")
    return made


def _shown(words: Sequence[str]) -> str:
    """The command without the folders of this machine."""
    return shlex.join(Path(word).name if word.startswith("/") else word for word in words)


def plain(value: Any) -> Any:
    """For JSON: what is no finite number becomes text."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    return value
