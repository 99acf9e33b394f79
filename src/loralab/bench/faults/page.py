"""The page of the fault benchmark: rates by family with exact intervals, and every run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from loralab.bench.faults.faults import FAULTS
from loralab.bench.faults.judgement import (
    LOOPS_MORE,
    MISREPORTED,
    NATS_LOST,
    SCORE_LOST,
    SIGNIFICANT,
    VISIBLE,
    Judged,
    judged,
    rate,
)
from loralab.bench.faults.peers import peers
from loralab.bench.faults.plan import Fault
from loralab.bench.faults.statistics import interval
from loralab.bench.table import Cell, Section, Table
from loralab.bench.timing import machine, versions

if TYPE_CHECKING:
    from loralab.bench.faults.command import Item

_SETS = {
    "development": "development seeds: limits may have been set on these healthy runs",
    "unseen": "unseen seeds: no limit was set on these",
}


def page(records: Mapping[Item, Mapping[str, Any]], command: str, chosen: str) -> Table:
    """The whole page of the runs that are there."""
    known = {fault.name: fault for fault in FAULTS}
    others = peers()
    broken = {item: row for item, row in records.items() if "error" in row}
    runs: dict[Item, Judged] = {}
    for item, row in records.items():
        if item in broken:
            continue
        fault = known[item.name] if item.kind == "fault" else None
        beside = None if fault is None else _beside(item, fault, records)
        runs[item] = judged(row, fault, beside, others)
    harmful = {i: one for i, one in runs.items() if i.kind == "fault" and one.harmful}
    benign = {i: one for i, one in runs.items() if i.kind == "fault" and one.harmful is False}
    healthy = {i: one for i, one in runs.items() if i.kind != "fault"}
    facts = {
        "command": command,
        "versions": ", ".join(f"{k} {v}" for k, v in versions("loralab", "peft", "trl").items()),
        "machine": machine(),
        "date": date.today().isoformat(),
        "runs": f"{len(runs)}, of {_SETS[chosen]}; {len(broken)} broke off",
    }
    sections = [
        _whole(harmful, benign, healthy),
        _families(harmful, known),
        _faults(harmful, benign, known),
        _healthy(healthy),
        _peers(harmful, healthy, list(others)),
        _left_out(harmful, healthy),
        _broken(broken),
    ]
    data = {"runs": [_row(item, one) for item, one in runs.items()]}
    return Table("Faults on purpose", facts, [one for one in sections if one.rows], data)


def _beside(
    item: Item, fault: Fault, records: Mapping[Item, Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """The run without the fault: same world, task and seed."""
    for other, row in records.items():
        same = (other.world, other.task, other.seed) == (item.world, item.task, item.seed)
        if other.kind == "healthy" and other.name == fault.setup and same and "error" not in row:
            return row
    return None


def _whole(
    harmful: Mapping[Item, Judged], benign: Mapping[Item, Judged], healthy: Mapping[Item, Judged]
) -> Section:
    rows: list[list[Cell]] = [
        ["harmful faults that FAIL", *_share(harmful.values()), 0.95],
        ["healthy runs that FAIL", *_share(healthy.values()), 0.0],
        [
            "right cause among the first two",
            *_of([one.named for one in harmful.values() if one.failed]),
            0.8,
        ],
        ["benign faults that FAIL", *_share(benign.values()), None],
        ["healthy runs that WARN", *_of([one.warned for one in healthy.values()]), None],
    ]
    leads = [one.lead for one in harmful.values() if one.lead is not None]
    notes = [
        f"Harm, named for each fault before it was run: {SCORE_LOST:g} fewer right answers of the "
        f"task (and p < {SIGNIFICANT:g} of the exact test of the pairs), {NATS_LOST:g} nats a "
        f"token more on held-out stories, {LOOPS_MORE:g} more answers that loop, or a reported "
        f"gain {MISREPORTED:g} off the real one, beside the run without the fault and with the "
        "same seed. Other faults are benign and reported apart."
    ]
    if leads:
        shown = fmean(float(one.shown) for one in harmful.values())
        notes.append(
            f"Median lead of the first FAIL over the validation loss being {VISIBLE:g} times its "
            f"own lowest: {median(leads):g} steps; in {1 - shown:.0%} of harmful runs it never "
            "showed, and the lead is to the end."
        )
    return Section(
        "All", "", ["", "runs", "of", "share", "95 % low", "high", "to reach"], rows, notes
    )


def _families(harmful: Mapping[Item, Judged], known: Mapping[str, Fault]) -> Section:
    rows: list[list[Cell]] = []
    for family in dict.fromkeys(fault.family for fault in known.values()):
        mine = [one for item, one in harmful.items() if known[item.name].family == family]
        if not mine:
            continue
        rows.append([family, *_share(mine), _middle(one.step for one in mine),
                     _middle(one.lead for one in mine),
                     _ratio([one.named for one in mine if one.failed]),
                     _middle(one.record.get("guard_share") for one in mine)])  # fmt: skip
    columns = ["family", "FAIL", "of", "share", "95 % low", "high", "steps to FAIL", "lead",
               "cause named", "guard's cost"]  # fmt: skip
    return Section(
        "By family of faults", "Of harmful runs. Steps and lead are medians.", columns, rows
    )


def _faults(
    harmful: Mapping[Item, Judged], benign: Mapping[Item, Judged], known: Mapping[str, Fault]
) -> Section:
    rows: list[list[Cell]] = []
    for name, fault in known.items():
        hurt = [one for item, one in harmful.items() if item.name == name]
        fine = [one for item, one in benign.items() if item.name == name]
        if not hurt and not fine:
            continue
        both = [*hurt, *fine]
        said = [cause for one in both for cause in one.causes[:1]]
        rows.append([name, fault.what, fault.harm, f"{len(hurt)}/{len(both)}",
                     f"{sum(one.failed for one in hurt)}/{len(hurt)}",
                     f"{sum(one.failed for one in fine)}/{len(fine)}",
                     f"{sum(one.warned for one in both)}/{len(both)}",
                     f"{sum(one.named for one in both)}/{len(both)}",
                     max(set(said), key=said.count) if said else "-"])  # fmt: skip
    columns = ["fault", "what", "harm", "harmful", "FAIL of harmful", "FAIL of benign", "WARN",
               "cause named", "cause told"]  # fmt: skip
    return Section("Faults", "", columns, rows)


def _healthy(healthy: Mapping[Item, Judged]) -> Section:
    rows: list[list[Cell]] = []
    for kind, name in dict.fromkeys((item.kind, item.name) for item in healthy):
        mine = [one for i, one in healthy.items() if (i.kind, i.name) == (kind, name)]
        rules = sorted({rule for one in mine if one.failed for rule in one.rules})
        warned = sorted({rule for one in mine if one.warned for rule in one.rules})
        rows.append([name, kind, len(mine),
                     sum(one.failed for one in mine), ", ".join(rules) or "-",
                     sum(one.warned for one in mine), ", ".join(warned) or "-",
                     _middle(one.record["used"]["score"] for one in mine)])  # fmt: skip
    columns = ["healthy run", "kind", "runs", "FAIL", "rules", "WARN", "rules ", "score"]
    intro = "`control`: kinds that look like trouble; `healthy`: what faults are set beside."
    return Section("Healthy runs", intro, columns, rows)


def _peers(
    harmful: Mapping[Item, Judged], healthy: Mapping[Item, Judged], names: Sequence[str]
) -> Section:
    rows: list[list[Cell]] = [["loralab", *_share(harmful.values()), *_share(healthy.values())]]
    for name in names:
        fails = [
            [one.peers[name] == "fail" for one in group.values()] for group in (harmful, healthy)
        ]
        rows.append([name, *_of(fails[0]), *_of(fails[1])])
    columns = ["judge", "FAIL of harmful", "of", "share", "low", "high",
               "FAIL of healthy", "of ", "share ", "low ", "high "]  # fmt: skip
    intro = "The same runs by others; they see the log, and nothing of an evaluation or a file."
    return Section("Beside others", intro, columns, rows)


def _left_out(harmful: Mapping[Item, Judged], healthy: Mapping[Item, Judged]) -> Section:
    rows: list[list[Cell]] = []
    for task in dict.fromkeys(item.task for item in (*harmful, *healthy)):
        hurt = [one for item, one in harmful.items() if item.task == task]
        fine = [one for item, one in healthy.items() if item.task == task]
        rows.append([task, *_share(hurt), *_share(fine)])
    columns = ["task", "FAIL of harmful", "of", "share", "low", "high",
               "FAIL of healthy", "of ", "share ", "low ", "high "]  # fmt: skip
    return Section("By task", "", columns, rows)


def _broken(broken: Mapping[Item, Mapping[str, Any]]) -> Section:
    rows: list[list[Cell]] = [[str(item.path), row["error"]] for item, row in broken.items()]
    return Section("Broke off", "In no rate above.", ["run", "error"], rows)


def _share(runs: Iterable[Judged]) -> list[Cell]:
    hits, of = rate(list(runs))
    return [hits, of, hits / of if of else None, *interval(hits, of)]


def _of(flags: Sequence[bool]) -> list[Cell]:
    hits, of = sum(flags), len(flags)
    return [hits, of, hits / of if of else None, *interval(hits, of)]


def _ratio(flags: Sequence[bool]) -> str:
    return f"{sum(flags)}/{len(flags)}"


def _middle(values: Iterable[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return float(median(known)) if known else None


def _row(item: Item, one: Judged) -> dict[str, Any]:
    used = {k: v for k, v in one.record["used"].items() if k not in ("right", "texts")}
    return {
        **vars(item),
        "harmful": one.harmful,
        "failed": one.failed,
        "warned": one.warned,
        "by": one.by,
        "step": one.step,
        "lead": one.lead,
        "causes": list(one.causes),
        "rules": list(one.rules),
        "peers": dict(one.peers),
        "seconds": one.record["seconds"],
        **used,
    }
