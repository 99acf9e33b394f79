"""The page of the fault benchmark, and its JSON, from records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from typing import Any

from loralab.bench.faults import sections
from loralab.bench.faults.faults import FAULTS
from loralab.bench.faults.items import Item, beside
from loralab.bench.faults.judgement import Judged, Record, judged
from loralab.bench.faults.left_out import left_out
from loralab.bench.faults.peers import peers
from loralab.bench.faults.sections import Groups, names_of
from loralab.bench.table import Table
from loralab.bench.timing import machine, versions

_SETS = {
    "development": "development seeds: limits may have been set on these healthy runs",
    "unseen": "unseen seeds: no limit was set on these",
}


def page(
    records: Mapping[Item, Record],
    command: str,
    chosen: str,
    *,
    wanted: Sequence[Item] = (),
    development: Mapping[Item, Record] | None = None,
    differing: int = 0,
) -> Table:
    """The whole page of the runs that are there.

    wanted: all runs of the set, of which those that are missing are named. development: the runs
    that the limits of `left_out` are set on; None takes these, if they are of that set. differing:
    how many runs of another plan or version were found.
    """
    known = {fault.name: fault for fault in FAULTS}
    others = peers()
    groups, runs = Groups(), dict[Any, Judged]()
    for item, row in records.items():
        fault = known[item.name] if item.kind == "fault" else None
        other = None if fault is None else records.get(beside(item))
        reference = None if other is None or "error" in other else other
        runs[item] = one = judged(row, fault, reference, others)
        if "error" in row:
            groups.broken[item] = str(row["error"])
        if fault is not None:
            kinds = {True: groups.harmful, False: groups.benign, None: groups.unknown}
            kinds[one.harmful][item] = one
        elif "error" not in row:
            groups.healthy[item] = one
    if development is None:
        development = records if chosen == "development" else {}
    missing = [item for item in wanted if item not in records]
    facts = {
        "command": command,
        "versions": ", ".join(
            f"{name} {one}"
            for name, one in versions("loralab", "peft", "trl", "trainproof").items()
        ),
        "machine": machine(),
        "date": date.today().isoformat(),
        "runs": f"{len(runs)}, of {_SETS[chosen]}; {len(groups.broken)} broke off, "
        f"{len(groups.unknown)} faults without a run to set them beside, {len(missing)} not run"
        + (f"; {differing} of another plan or version were found" if differing else ""),
    }
    tables = [
        sections.whole(groups),
        sections.rates("By family of faults", "family", groups, _families(records)),
        sections.rates("By task", "task", groups, _by(records, "task")),
        sections.rates("By model", "model", groups, _by(records, "world")),
        sections.judges(groups),
        sections.leads(groups, known),
        sections.peers(groups, list(others)),
        left_out(groups.harmful, groups.healthy, development),
        sections.faults(groups, known),
        sections.healthy(groups),
        sections.costs(runs),
        sections.uncounted(groups, missing),
    ]  # fmt: skip
    data = {"runs": [_row(item, one) for item, one in runs.items()]}
    return Table("Faults on purpose", facts, [one for one in tables if one.rows or one.notes], data)


def _families(items: Iterable[Item]) -> dict[str, Callable[[Item], bool]]:
    """The faults of each family that these are of, and the healthy runs they are set beside."""
    found: dict[str, Callable[[Item], bool]] = {}
    there = {item.name for item in items if item.kind == "fault"}
    for family in dict.fromkeys(fault.family for fault in FAULTS if fault.name in there):
        mine = {fault.name for fault in FAULTS if fault.family == family}
        setups = {fault.setup for fault in FAULTS if fault.family == family}

        def holds(item: Item, mine: set[str] = mine, setups: set[str] = setups) -> bool:
            return not (mine if item.kind == "fault" else setups).isdisjoint(names_of(item))

        found[family] = holds
    return found


def _by(items: Iterable[Item], name: str) -> dict[str, Callable[[Item], bool]]:
    """By a field of the run."""
    found: dict[str, Callable[[Item], bool]] = {}
    for value in dict.fromkeys(getattr(item, name) for item in items):

        def holds(item: Item, value: str = value) -> bool:
            return bool(getattr(item, name) == value)

        found[value] = holds
    return found


def _row(item: Item, one: Judged) -> dict[str, Any]:
    """Of a run, for the JSON."""
    record = one.record
    if "error" in record:
        return {**vars(item), "error": record["error"]}
    used = {k: v for k, v in record["used"].items() if k not in ("right", "texts")}
    return {
        **vars(item),
        "harmful": one.harmful,
        "failed": one.failed,
        "warned": one.warned,
        "guard": one.guard,
        "doctor": one.doctor,
        "by": one.by,
        "step": one.step,
        "injected": one.injected,
        "shown": one.shown,
        "lead": one.lead,
        "causes": list(one.causes),
        "named": one.named,
        "rules": list(one.rules),
        "peers": dict(one.peers),
        "guard_seconds": record["guard_seconds"],
        "guard_share": record["guard_share"],
        "seconds": record["seconds"],
        **used,
    }
