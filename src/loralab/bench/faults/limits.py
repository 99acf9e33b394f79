"""Limits set by a formula on healthy runs, so that a part of these can be left out of the setting.

Of each rule, its fail conditions in turn: the worst healthy value while the rule's other conditions
hold (where these never do, the worst of all), SLACK times as bad; never looser than the frozen
limit, and never nearer to the healthy than NEAREST of it: a limit in between is a limit that
somebody might have set. Limits of 0 are definitions and stay; so do those on what the runs at hand
never measured. Each condition is set with the earlier ones as they now are, so that no reading
that limits were set on fails unless the frozen limits fail it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan

from loralab.bench.faults.items import Item
from loralab.bench.faults.judgement import Record, doctor_readings, guard_readings
from loralab.health.condition import Condition
from loralab.health.reading import Reading
from loralab.health.rule import Rule
from loralab.health.rules import RULES
from loralab.health.thresholds import Limit

SLACK = 1.2
NEAREST = 0.5


@dataclass(frozen=True)
class Seen:
    """One reading that a rule judges. quantities: what each fail condition compares with its
    limit."""

    item: Item
    step: int
    quantities: tuple[float, ...]


def above(condition: Condition) -> bool:
    """Whether more of its quantity is worse."""
    return condition.above or condition.against == "base"


def quantity(condition: Condition, reading: Reading) -> float:
    """What is compared with the limit: the value, its distance from the base's, or its share."""
    value, base = condition.of(reading), condition.base_of(reading)
    if condition.against == "limit":
        return value
    if condition.against == "share of base":
        return value / base if base else nan
    far = value - base
    return far if condition.above or condition.against == "near base" else -far


def worse(condition: Condition, first: float, second: float) -> bool:
    return first > second if above(condition) else first < second


def beyond(condition: Condition, value: float, limit: float) -> bool:
    """Whether it holds of a quantity at this limit; of one that is not known, as it says itself."""
    return condition.missing if isnan(value) else worse(condition, value, limit)


def fails(rule: Rule, one: Seen) -> bool:
    """Whether one reading is beyond all its limits; a rule may want several in a row."""
    return all(
        beyond(condition, value, condition.limit.value)
        for condition, value in zip(rule.fail, one.quantities, strict=True)
    )


def readings_of(record: Record) -> list[Reading]:
    """All that its guard and its doctor judged, each once; a search's generations too."""
    texts, *generations = guard_readings(record) or [[]]
    return [*texts, *(one for look in generations for one in look), *doctor_readings(record)]


def seen_by_rule(records: Mapping[Item, Record], rules: Iterable[Rule]) -> list[list[Seen]]:
    """Of each rule the readings it judges in these runs."""
    readings = [(item, one) for item, row in records.items() for one in readings_of(row)]
    return [
        [
            Seen(item, one.step, tuple(quantity(condition, one) for condition in rule.fail))
            for item, one in readings
            if rule.looks_at(one)
        ]
        for rule in rules
    ]


class Setting:
    """Sets limits on healthy runs, less a part of them."""

    def __init__(self, healthy: Mapping[Item, Record]) -> None:
        self._seen = seen_by_rule(healthy, RULES)

    def without(self, left_out: Callable[[Item], bool]) -> tuple[Rule, ...]:
        """All rules, with limits set on the other runs."""
        return tuple(
            set_on(rule, [one for one in seen if not left_out(one.item)])
            for rule, seen in zip(RULES, self._seen, strict=True)
        )


def set_on(rule: Rule, seen: Sequence[Seen]) -> Rule:
    """The rule with the limits of its fail conditions set on healthy readings."""
    limits = [condition.limit.value for condition in rule.fail]
    for at, condition in enumerate(rule.fail):
        frozen = limits[at]
        held = while_others_hold(rule.fail, limits, at, seen)
        known = [one.quantities[at] for one in held or seen]
        known = [value for value in known if not isnan(value)]
        # What may only acquit accuses nobody, and no healthy run says how near it may come.
        if frozen <= 0 or condition.missing or not known:
            continue
        if above(condition):
            limits[at] = min(frozen, max(SLACK * max(known), NEAREST * frozen))
        else:
            limits[at] = max(frozen, min(min(known) / SLACK, frozen / NEAREST))
    fail = tuple(
        replace(condition, limit=Limit(value, condition.limit.evidence))
        for condition, value in zip(rule.fail, limits, strict=True)
    )
    return replace(rule, fail=fail)


def while_others_hold(
    conditions: Sequence[Condition], limits: Sequence[float], at: int, seen: Iterable[Seen]
) -> list[Seen]:
    """Readings that are known at one condition and beyond the limits of all others."""
    return [
        one
        for one in seen
        if not isnan(one.quantities[at])
        and all(
            beyond(condition, one.quantities[other], limits[other])
            for other, condition in enumerate(conditions)
            if other != at
        )
    ]
