"""`loralab bench faults`: run what is missing of a set of runs, judge all there is, write the page.

A run is a file of WORK/runs; killed at any moment, the benchmark goes on with the first that is
missing. What another plan or other code measured counts as missing, and what broke off is tried
again. Judging reads the files alone: `--table-only` does it again under today's rules.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from loralab import durable
from loralab.bench.faults.items import Item as Item
from loralab.bench.faults.items import items, plan_of
from loralab.bench.faults.origin import code, differences, origin
from loralab.bench.faults.plan import Plan
from loralab.bench.faults.tasks import Small, kinds_of
from loralab.bench.faults.words import PARTS
from loralab.errors import UserError
from loralab.yaml import parse_yaml

PAGE = Path("docs/faults.md")
CONFIGS = Path("benchmarks/faults")
_QUICK_STEPS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, run, judge, write the page and its JSON."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(given)
    work = Path(options.work) / ("quick" if options.quick else options.chosen)
    asked = settings(options)
    only = None if options.only is None else options.only.split(",")
    wanted = items(asked["worlds"], only, options.quick)
    if options.plan:
        print("\n".join(reckoned(wanted, work, asked, options)))
        return 0
    if options.margins:
        if options.chosen != "development":
            raise UserError("--margins: limits are set on the development set alone")
        from loralab.bench.faults.margins import margins
        from loralab.bench.faults.reached import section

        records = read(wanted, work, asked, options)[0]
        healthy = {item: row for item, row in records.items() if item.kind != "fault"}
        print(margins(records).markdown(), section(healthy).markdown(), sep="\n")
        return 0
    if not options.table_only:
        if options.stories is None:
            raise UserError("bench faults: --stories is missing; expected a file of TinyStories")
        _run(shard(wanted, options.shard), asked, options, work)
    if options.shard is not None:
        print("done; --table-only judges all that there is")
        return 0
    from loralab.bench.faults.page import page

    found, differing = read(wanted, work, asked, options)
    made = page(
        found,
        f"`loralab bench faults {_shown(given)}`",
        options.chosen,
        wanted=wanted,
        development=_development(options),
        differing=differing,
    )
    place = options.page or (PAGE if is_the_table(options, wanted, found) else None)
    if place is None:
        print(made.markdown())
    else:
        made.write(Path(place))
        print(place)
    return 0


def _development(options: Any) -> dict[Item, Any] | None:
    """The runs that limits are set on, of a set that is not they; a quick one has none."""
    if options.chosen == "development" or options.quick:
        return None
    own = parser().parse_args(["--set", "development"])
    work = Path(options.work) / own.chosen
    if not work.is_dir():
        return None
    own.any_version = options.any_version
    asked = settings(own)
    return read(items(asked["worlds"]), work, asked, own)[0]


def is_the_table(options: Any, wanted: Sequence[Item], found: Mapping[Item, Any]) -> bool:
    """Whether this is the whole unseen set, which alone PAGE is made of."""
    part = (options.only, options.seeds, options.worlds, options.config)
    whole = not options.quick and all(one is None for one in part)
    return options.chosen == "unseen" and whole and len(found) == len(wanted)


def shard(wanted: Sequence[Item], part: str | None) -> list[Item]:
    """Every Nth from the Ith on, of all: what is done already moves none to another process.

    Raises:
        UserError: not I/N with I from 0 to N - 1.
    """
    if part is None:
        return list(wanted)
    first, _, of = part.partition("/")
    if not (first.isdigit() and of.isdigit() and int(first) < int(of)):
        raise UserError(f"--shard is {part!r}; expected I/N, I from 0 to N - 1, such as 0/2")
    return list(wanted[int(first) :: int(of)])


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
    add("--page", metavar="FILE", help=f"default: {PAGE} of the whole unseen set, else printed")
    add("--shard", metavar="I/N", help="every Nth run from the Ith on; processes share a set")
    add("--plan", action="store_true", help="say what is to be run and how long it takes; run none")
    add("--table-only", action="store_true", help="judge the runs that are there; run none")
    add(
        "--any-version",
        action="store_true",
        help="take runs of another plan or that other code measured, too",
    )
    add("--margins", action="store_true", help="how near healthy runs come to each limit; run none")
    return made


def _run(wanted: Sequence[Item], asked: Mapping[str, Any], options: Any, work: Path) -> None:
    from loralab.bench.faults.trial import run_trial
    from loralab.bench.faults.world import Making, World, read_stories, small_world

    stories = read_stories(options.stories)
    making = Making(hidden=64, layers=2, steps=100) if options.quick else Making()
    folder = work if options.quick else Path(options.work)
    worlds: dict[str, World] = {}
    done, _ = read(wanted, work, asked, options)
    todo = [item for item in wanted if "error" in done.get(item, {"error": "missing"})]
    files = code()
    for number, item in enumerate(todo, 1):
        if item.world not in worlds:
            worlds[item.world] = (
                small_world(folder, stories, making, asked["words"])
                if item.world == "small"
                else World(item.world, item.world, stories, asked["words"])
            )
        plan = planned(item, asked, options.quick)
        made_of = origin(plan, asked["words"], files)
        world = worlds[item.world]
        task = Small(item.task, item.seed, 256, world.tested, asked["words"], plan.sign)
        began, cost = time.perf_counter(), time.process_time()
        try:
            record = run_trial(plan, task, world, item.seed)
        except Exception as error:
            # A benchmark of broken runs goes on past one that breaks off; the page names it.
            record = {"error": f"{type(error).__name__}: {error}"}
        record |= {
            "origin": made_of,
            "seconds": time.perf_counter() - began,
            "processor_seconds": time.process_time() - cost,
        }
        place = work / "runs" / item.path
        place.parent.mkdir(parents=True, exist_ok=True)
        durable.write_whole(place, json.dumps(plain({**vars(item), **record})) + "\n")
        told = record.get("error") or (
            f"score {record['used']['score']:.2f}, the base {record['base']['score']:.2f}"
        )
        print(
            f"{number} of {len(todo)}: {item.path}: {told}, {record['seconds']:.0f} s", flush=True
        )


def planned(item: Item, asked: Mapping[str, Any], quick: bool = False) -> Plan:
    """What an item's run does in a set; a quick one a little of it."""
    own = dict(asked["worlds"][item.world].get("plan", {}))
    plan = plan_of(item, own | {"steps": _QUICK_STEPS} if quick else own)
    if quick and plan.search is not None:
        plan.search["generations"] = 4
    return plan


def read(
    wanted: Sequence[Item], work: Path, asked: Mapping[str, Any], options: Any
) -> tuple[dict[Item, dict[str, Any]], int]:
    """The runs that are there; and how many of another plan or that other code measured, which are
    among them if any version is asked for. Says of these what is different."""
    found, others, why = {}, 0, dict[str, None]()
    files = code()
    for item in wanted:
        place = work / "runs" / item.path
        if not place.is_file():
            continue
        record = json.loads(place.read_text(encoding="utf-8"))
        mine = origin(planned(item, asked, options.quick), asked["words"], files)
        off = differences(record, mine)
        others += bool(off)
        why |= dict.fromkeys(off)
        if not off or options.any_version:
            found[item] = record
    if others:
        said = "judged all the same" if options.any_version else "left out"
        print(
            f"{work.name}: {others} runs of another plan or version, {said}; "
            f"what differs: {', '.join(why)}",
            file=sys.stderr,
        )
    return found, others


def reckoned(
    wanted: Sequence[Item], work: Path, asked: Mapping[str, Any], options: Any
) -> Iterator[str]:
    """How many runs are missing, and the hours they take if they take what such runs took."""
    done, _ = read(wanted, work, asked, options)
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
    """What the set's file says, and what the options say instead.

    Raises:
        UserError: no such file, or a world, words or a task that there is not.
    """
    path = Path(options.config) if options.config else CONFIGS / f"{options.chosen}.yaml"
    if not path.is_file():
        raise UserError(f"bench faults: no {path}; run in the repository, or give --config FILE")
    made: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if made.get("words") not in PARTS:
        raise UserError(f"{path}: words {made.get('words')!r}; known: {', '.join(PARTS)}")
    known = kinds_of(made["words"])
    for world in made["worlds"].values():
        for task in world["tasks"]:
            if task not in known:
                raise UserError(f"{path}: task {task!r}; known: {', '.join(known)}")
        if options.seeds is not None:
            world["seeds"] = [int(seed) for seed in options.seeds.split(",")]
    if options.worlds is not None:
        names = options.worlds.split(",")
        if strange := sorted(set(names) - set(made["worlds"])):
            known = tuple(made["worlds"])
            raise UserError(f"--worlds: no {strange[0]!r}; known: {', '.join(known)}")
        made["worlds"] = {name: made["worlds"][name] for name in names}
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
