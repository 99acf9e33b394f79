"""Leave one out: limits set without a task, a family of faults or a kind of healthy run, and what
they then make of it. How limits are set without it: `limits`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loralab.bench.faults.faults import FAULTS
from loralab.bench.faults.items import Item, fault_of
from loralab.bench.faults.judgement import Judged, Record, judged
from loralab.bench.faults.limits import NEAREST, SLACK, Setting
from loralab.bench.faults.sections import names_of, rate
from loralab.bench.table import Cell, Section
from loralab.health.rule import Rule

_PLAIN = "lora"
"""What most faults are set beside: of no family."""


@dataclass(frozen=True)
class Part:
    """What is left out: `holds` says which runs, healthy ones of the setting and judged ones."""

    what: str
    name: str
    holds: Callable[[Item], bool]


def parts(items: Mapping[Item, object]) -> Iterator[Part]:
    """Every task, family of faults (with the healthy runs that its faults alone are set beside)
    and kind of healthy run among these."""
    for task in dict.fromkeys(item.task for item in items):

        def asked(item: Item, task: str = task) -> bool:
            return item.task == task

        yield Part("task", task, asked)
    for family in dict.fromkeys(fault.family for fault in FAULTS):
        mine = {fault.name for fault in FAULTS if fault.family == family}
        beside = {fault.setup for fault in FAULTS if fault.family == family} - {_PLAIN}

        def holds(item: Item, mine: set[str] = mine, beside: set[str] = beside) -> bool:
            return not (mine if item.kind == "fault" else beside).isdisjoint(names_of(item))

        if any(item.kind == "fault" and item.name in mine for item in items):
            yield Part("family of faults", family, holds)
    kinds = (names_of(item) for item in items if item.kind != "fault")
    for name in dict.fromkeys(name for names in kinds for name in names):

        def named(item: Item, name: str = name) -> bool:
            return item.kind != "fault" and name in names_of(item)

        yield Part("healthy kind", name, named)


def left_out(
    harmful: Mapping[Item, Judged],
    healthy: Mapping[Item, Judged],
    development: Mapping[Item, Record],
) -> Section:
    """A row for each part, and one for all of a sort that set any limits. These are set on the
    healthy runs of `development` that are not in the part; nothing without any."""
    columns = ["left out", "", "runs it set limits on", "limits it held", "harmful FAIL (95 %)",
               "by frozen limits", "healthy FAIL (95 %)", "by frozen limits ",
               "rules that do"]  # fmt: skip
    ours = {
        item: row
        for item, row in development.items()
        if item.kind != "fault" and "error" not in row
    }
    if not ours:
        note = "No healthy development runs are there, on which limits could be set."
        return Section("Left out one at a time", "", columns, [], [note])
    setting = Setting(ours)
    whole = _limits(setting.without(lambda _: False))
    rows: list[list[Cell]] = []
    every: dict[str, list[dict[Item, bool]]] = {}
    left: list[str] = []
    for part in parts({**harmful, **healthy}):
        gone = sum(part.holds(item) for item in ours)
        rules = setting.without(part.holds)
        moved = sum(a != b for a, b in zip(whole, _limits(rules), strict=True))
        hurt = {item: one for item, one in harmful.items() if part.holds(item)}
        fine = {item: one for item, one in healthy.items() if part.holds(item)}
        alarms = _again(fine, rules)
        told = sorted({rule for one in alarms.values() if one.failed for rule in one.rules})
        flags = [
            {item: one.failed for item, one in runs.items()}
            for runs in (_again(hurt, rules), hurt, alarms, fine)
        ]
        if gone:
            left.append(part.what)
            for kept, new in zip(every.setdefault(part.what, [{}, {}, {}, {}]), flags, strict=True):
                # A healthy run of several kinds counts once, and as failed if it ever was.
                kept |= {item: failed or kept.get(item, False) for item, failed in new.items()}
        cells = [rate(one.values()) for one in flags]
        rows.append([part.what, part.name, gone, moved, *cells, ", ".join(told) or "-"])
    totals: list[list[Cell]] = [
        [what, f"all, each in turn ({left.count(what)})", None, None,
         *(rate(one.values()) for one in flags), "-"]
        for what, flags in every.items()
    ]  # fmt: skip
    intro = (
        f"Limits set by a formula on {len(ours)} healthy development runs less the part, and the "
        "part judged by them, beside the frozen limits. Of each rule's fail conditions in turn: "
        f"{SLACK:g} times the worst healthy value while the rule's other conditions hold (of all "
        "values, where these never do), never looser than the frozen limit and never under "
        f"{NEAREST:g} of it (for limits from below: 1 / {SLACK:g} of the least, up to "
        f"{1 / NEAREST:g} times the frozen one). Limits of 0 stay, and so do limits on what no run "
        "that is left measured. No fault sets a limit; with a family of faults the healthy runs "
        "that they alone are set beside are left out. A part that set no limits (a task of the "
        "unseen set alone, a family whose faults are set beside plain LoRA) cannot be left out: it "
        "is judged by limits set on all, and is in no row of all. `limits it held`: those that all "
        "healthy runs together would have set otherwise. Since no limit is looser than the frozen "
        "one, the detection here cannot be worse: it is the false alarms that this may show."
    )
    return Section("Left out one at a time", intro, columns, [*totals, *rows])


def _again(runs: Mapping[Item, Judged], rules: tuple[Rule, ...]) -> dict[Item, Judged]:
    """By other limits; harm stays what it is."""
    return {
        item: judged(
            one.record, fault_of(item.name) if item.kind == "fault" else None, None, {}, rules
        )
        for item, one in runs.items()
    }


def _limits(rules: tuple[Rule, ...]) -> list[float]:
    return [condition.limit.value for rule in rules for condition in rule.fail]
