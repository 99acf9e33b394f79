"""How near healthy runs come to each rule's failure: what limits are set by.

Oriented so that more is worse: for "under" conditions the sign is turned. A task is left out in
turn: where its worst healthy value passes that of all other tasks by more than a fifth, a limit set
without it would have been set too near.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

from loralab.bench.table import Cell, Section
from loralab.health.condition import Condition
from loralab.health.reading import Reading
from loralab.health.rule import Rule, moment_of
from loralab.health.rules import RULES

if TYPE_CHECKING:
    from loralab.bench.faults.command import Item

SLACK = 1.2


def margins(records: Mapping[Item, Mapping[str, Any]]) -> Section:
    """A row for each rule that can fail: its first condition's limit, the worst healthy value, the
    worst while the other conditions hold, and tasks that no other task foretells."""
    healthy = [(item, row) for item, row in records.items() if item.kind != "fault"]
    readings = [(item, one) for item, row in healthy for one in _readings(row)]
    rows: list[list[Cell]] = []
    for rule in RULES:
        if not rule.fail:
            continue
        first, others = rule.fail[0], rule.fail[1:]
        seen = [(item, one) for item, one in readings if _judges(rule, one)]
        known = [(item, badness(first, one)) for item, one in seen]
        known = [(item, value) for item, value in known if isfinite(value)]
        if not known:
            continue
        close = [
            badness(first, one) for _, one in seen if all(other.holds(one) for other in others)
        ]
        close = [value for value in close if isfinite(value)]
        fails = {item for item, one in seen if all(c.holds(one) for c in rule.fail)}
        rows.append(
            [
                rule.name,
                f"{first.value} {first.bound()}",
                max(value for _, value in known) * (1 if first.above else -1),
                max(close) * (1 if first.above else -1) if close and others else None,
                len(fails),
                ", ".join(_unforetold(known)) or "-",
            ]
        )
    columns = ["rule", "fails at", "worst healthy", "while the rest holds", "healthy runs over it",
               "tasks beyond the others"]  # fmt: skip
    return Section(
        "Margins", f"Of {len(healthy)} healthy runs, {len(readings)} readings.", columns, rows
    )


def badness(condition: Condition, reading: Reading) -> float:
    """What is compared with the limit; more is worse. A share of the base's is in the base's."""
    value, base = condition.of(reading), condition.base_of(reading)
    if condition.against in ("base", "near base"):
        value -= base
    elif condition.against == "share of base":
        value = value / base if base else float("nan")
    return value if condition.above else -value


def _unforetold(known: Iterable[tuple[Item, float]]) -> Iterator[str]:
    worst: dict[str, float] = {}
    for item, value in known:
        worst[item.task] = max(value, worst.get(item.task, value))
    for task, value in worst.items():
        others = [other for name, other in worst.items() if name != task]
        if others and value > max(others) + (SLACK - 1) * abs(max(others)):
            yield task


def _judges(rule: Rule, reading: Reading) -> bool:
    return moment_of(reading) in rule.moments and reading.step >= rule.since


def _readings(record: Mapping[str, Any]) -> Iterator[Reading]:
    if "error" in record:
        return
    for row in (*record["readings"], *record["doctor"]["readings"]):
        yield Reading.from_json(row)
