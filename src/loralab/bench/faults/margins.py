"""How near healthy runs come to each rule's failure, and how far faults go: what limits are set by.

A task is left out in turn: where its worst healthy value passes that of all other tasks by more
than a fifth, a limit set without it would have been set too near.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite

from loralab.bench.faults.items import Item, beside, fault_of
from loralab.bench.faults.judgement import Record, harm
from loralab.bench.faults.limits import (
    SLACK,
    Seen,
    above,
    fails,
    readings_of,
    seen_by_rule,
    while_others_hold,
    worse,
)
from loralab.bench.faults.plan import Fault
from loralab.bench.table import Cell, Section
from loralab.health.condition import Condition, figure
from loralab.health.rule import Rule
from loralab.health.rules import RULES


def margins(records: Mapping[Item, Record]) -> Section:
    """A row for each fail condition of each rule: its limit; the worst healthy value, and the worst
    while the rule's other conditions hold, each with its run; how many healthy runs fail by the
    rule; of the harmful faults whose cause the rule names, the worst value of each run, from the
    least bad run to the worst, and how many of them fail by it; tasks no other task foretells.
    """
    rules = [rule for rule in RULES if rule.fail]
    healthy = {item: row for item, row in records.items() if item.kind != "fault"}
    broken = {item: row for item, row in records.items() if item.kind == "fault"}
    hurt = {item: row for item, row in broken.items() if _hurts(item, row, records)}
    rows: list[list[Cell]] = []
    for rule, fine, bad in zip(
        rules, seen_by_rule(healthy, rules), seen_by_rule(hurt, rules), strict=True
    ):
        over = len({one.item for one in fine if fails(rule, one)})
        named = [one for one in bad if _cause_of(rule, fault_of(one.item.name))]
        for at, condition in enumerate(rule.fail):
            known = [one for one in fine if isfinite(one.quantities[at])]
            limits = [other.limit.value for other in rule.fail]
            held = while_others_hold(rule.fail, limits, at, known) if limits[1:] else []
            faults = list(_faults(rule, at, named))
            if known or faults:
                rows.append(
                    [rule.name, f"{condition.value} {condition.bound()}",
                     _worst(condition, at, known), _worst(condition, at, held), over,
                     "; ".join(faults) or "-",
                     ", ".join(_unforetold(condition, at, known)) or "-"]
                )  # fmt: skip
    readings = sum(len(readings_of(row)) for row in healthy.values())
    return Section(
        "Margins",
        f"Of {len(healthy)} healthy runs, {readings} readings; beside them {len(hurt)} runs of "
        f"faults that do harm, of {len(broken)}.",
        ["rule", "fails at", "worst healthy", "while the rest holds", "healthy runs over it",
         "harmful faults", "tasks beyond the others"],
        rows,
    )  # fmt: skip


def _cause_of(rule: Rule, fault: Fault) -> bool:
    return bool({rule.cause, *rule.also} & set(fault.causes))


def _hurts(item: Item, record: Record, records: Mapping[Item, Record]) -> bool:
    other = records.get(beside(item))
    if "error" in record or other is None or "error" in other:
        return False
    return harm(fault_of(item.name), record, other) >= 1


def _worst(condition: Condition, at: int, seen: Sequence[Seen]) -> str:
    if not seen:
        return "-"
    one = seen[0]
    for other in seen:
        if worse(condition, other.quantities[at], one.quantities[at]):
            one = other
    return f"{figure(one.quantities[at])} ({one.item.path.with_suffix('')}, step {one.step})"


def _faults(rule: Rule, at: int, seen: Iterable[Seen]) -> Iterator[str]:
    runs: dict[str, dict[Item, list[Seen]]] = {}
    for one in seen:
        runs.setdefault(one.item.name, {}).setdefault(one.item, []).append(one)
    for name, by_item in runs.items():
        failing = sum(any(fails(rule, one) for one in mine) for mine in by_item.values())
        values = [
            _extreme(rule.fail[at], [one.quantities[at] for one in mine])
            for mine in by_item.values()
        ]
        known = sorted(value for value in values if value is not None)
        if not above(rule.fail[at]):
            known.reverse()
        if known:
            yield (
                f"{name} {figure(known[0])} to {figure(known[-1])} ({failing} of {len(by_item)})"
            )


def _extreme(condition: Condition, values: Iterable[float]) -> float | None:
    known = [value for value in values if isfinite(value)]
    if not known:
        return None
    return max(known) if above(condition) else min(known)


def _unforetold(condition: Condition, at: int, seen: Iterable[Seen]) -> Iterator[str]:
    tasks: dict[str, list[float]] = {}
    for one in seen:
        tasks.setdefault(one.item.task, []).append(one.quantities[at])
    sign = 1 if above(condition) else -1
    worst = {task: max(sign * value for value in values) for task, values in tasks.items()}
    for task, value in worst.items():
        others = [other for name, other in worst.items() if name != task]
        if others and value > max(others) + (SLACK - 1) * abs(max(others)):
            yield task
