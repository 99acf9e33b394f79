"""How near healthy runs come to each limit of `health/thresholds.py`, whichever rules use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isnan

from loralab.bench.faults.items import Item
from loralab.bench.faults.judgement import Record
from loralab.bench.faults.limits import above, seen_by_rule, while_others_hold, worse
from loralab.bench.table import Cell, Section
from loralab.health import thresholds
from loralab.health.condition import Condition, figure
from loralab.health.rules import RULES
from loralab.health.thresholds import Limit


def named_limits() -> dict[str, Limit]:
    """Every limit by the name it has in `thresholds`."""
    return {name: one for name, one in vars(thresholds).items() if isinstance(one, Limit)}


def reached(healthy: Mapping[Item, Record]) -> dict[str, float]:
    """By limit, the worst that healthy runs came to where the rule's other conditions held; where
    these never did, the worst of all. Limits that no healthy run measured are left out.

    Conditions that may only acquit do not count, nor do those that want more where the limit's
    first use wants less, or the other way round.
    """
    names = {id(one): name for name, one in named_limits().items()}
    found: dict[str, tuple[Condition, float]] = {}
    accusing = [*RULES, *(replace(rule, fail=rule.warn) for rule in RULES)]
    for rule, seen in zip(accusing, seen_by_rule(healthy, accusing), strict=True):
        limits = [one.limit.value for one in rule.fail]
        for at, condition in enumerate(rule.fail):
            held = while_others_hold(rule.fail, limits, at, seen)
            values = [one.quantities[at] for one in held or seen]
            known = [value for value in values if not isnan(value)]
            name = names.get(id(condition.limit))
            if name is None or condition.missing or not known:
                continue
            value = max(known) if above(condition) else min(known)
            first, before = found.get(name, (condition, value))
            if above(first) == above(condition):
                found[name] = (first, value if worse(condition, value, before) else before)
    return {name: value for name, (_, value) in found.items()}


def section(healthy: Mapping[Item, Record]) -> Section:
    """A row for each limit: its value, and what healthy runs came to."""
    worst = reached(healthy)
    rows: list[list[Cell]] = [
        [f"`{name}`", figure(limit.value), figure(worst[name]) if name in worst else "-"]
        for name, limit in named_limits().items()
    ]
    return Section(
        "Limits",
        f"The worst that {len(healthy)} healthy runs came to while the rule's other conditions "
        "held; where these never did, the worst of all, which may be beyond a limit that is one "
        "of several.",
        ["limit", "value", "healthy, at worst"],
        rows,
    )
