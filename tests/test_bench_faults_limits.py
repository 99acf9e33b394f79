"""Limits set on healthy runs by a formula, and a part of the runs judged without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, nan
from random import Random
from typing import Any

import pytest

from fault_records import (
    item,
    judged_runs,
    newlines,
    readings,
    record,
    rule,
)
from loralab.bench.faults.judgement import judged
from loralab.bench.faults.left_out import left_out, parts
from loralab.bench.faults.limits import NEAREST, SLACK, Seen, Setting, fails, quantity, set_on
from loralab.health.condition import (
    below_share,
    if_known,
    near_base,
    over,
    over_base,
    under,
    under_base,
)
from loralab.health.reading import Reading
from loralab.health.rule import Rule
from loralab.health.rules import RULES
from loralab.health.thresholds import Limit


def a_rule(*conditions: Any) -> Rule:
    return replace(rule("text.newlines"), fail=conditions)


def seen(*rows: Sequence[float]) -> list[Seen]:
    return [Seen(item("healthy", "lora"), 5, tuple(row)) for row in rows]


def limits(made: Rule) -> list[float]:
    return [condition.limit.value for condition in made.fail]


def test_a_limit_is_the_worst_healthy_value_and_a_slack_between_half_and_all_of_the_frozen() -> (
    None
):
    high = a_rule(over("x", Limit(1.0, "")))
    assert limits(set_on(high, seen([0.6], [0.7]))) == [pytest.approx(SLACK * 0.7)]
    assert limits(set_on(high, seen([0.01]))) == [NEAREST]
    assert limits(set_on(high, seen([0.01], [0.95]))) == [1.0]
    assert limits(set_on(high, seen([nan]))) == [1.0]
    assert limits(set_on(high, [])) == [1.0]
    assert limits(set_on(high, seen([0.1], [inf]))) == [1.0]
    low = a_rule(under("x", Limit(1.0, "")))
    assert limits(set_on(low, seen([1.8], [5.0]))) == [pytest.approx(1.8 / SLACK)]
    assert limits(set_on(low, seen([50.0]))) == [1.0 / NEAREST]
    assert limits(set_on(low, seen([1.1]))) == [1.0]
    acquitting = a_rule(if_known(over("x", Limit(1.0, ""))), over("y", Limit(1.0, "")))
    # Not known, it holds; and stays where it is.
    assert limits(set_on(acquitting, seen([nan, 0.8], [0.5, 0.9]))) == [1.0, pytest.approx(0.96)]
    # By definition.
    assert limits(set_on(a_rule(over("x", Limit(0.0, ""))), seen([-3.0]))) == [0.0]


def test_conditions_are_set_in_turn_so_that_what_they_were_set_on_does_not_fail() -> None:
    both = a_rule(over("x", Limit(1.0, "")), over("y", Limit(1.0, "")))
    healthy = seen([0.8, 2.0], [2.0, 0.3], [0.9, 0.9])
    made = set_on(both, healthy)
    # x while y > 1: 0.8. y while x > 0.96: 0.3, so the least there is. Of (0.9, 0.9) neither knows.
    assert limits(made) == [pytest.approx(0.96), 0.5]
    for one in healthy:
        held = zip(one.quantities, limits(made), strict=True)
        assert not all(value > limit for value, limit in held)
    # Both at once would be 0.96 and 0.5 too, but here would fail the last by 0.5 and 0.5.
    tight = set_on(both, seen([0.1, 2.0], [2.0, 0.1], [0.9, 0.9]))
    assert limits(tight) == [0.5, 1.0]


def test_quantities_are_what_a_condition_compares() -> None:
    values = {"x": 0.5, "base.x": 2.0}
    reading = Reading(0, values, (), 0.0)
    some = Limit(0.25, "")
    assert quantity(over("x", some), reading) == 0.5
    assert quantity(over_base("x", some), reading) == -1.5
    assert quantity(under_base("x", some), reading) == 1.5
    assert quantity(near_base("x", some), reading) == -1.5
    assert quantity(below_share("x", some), reading) == 0.25


@pytest.mark.parametrize("one", [one for one in RULES if one.fail], ids=lambda one: one.name)
def test_quantities_beyond_all_limits_are_what_a_rule_fails_by(one: Rule) -> None:
    random = Random(one.name)
    hits = 0
    for _ in range(300):
        values: dict[str, float] = {}
        for condition in one.fail:
            scale = 3 * abs(condition.limit.value) + 0.1
            if random.random() < 0.9:
                values[condition.value] = random.uniform(-scale, 2 * scale)
            values.setdefault(f"base.{condition.value}", random.uniform(0.1, scale))
        reading = Reading(0, values, (), 0.0)
        holds = all(condition.holds(reading) for condition in one.fail)
        quantities = tuple(quantity(condition, reading) for condition in one.fail)
        assert fails(one, Seen(item("healthy", "lora"), 0, quantities)) == holds
        hits += holds
    assert hits or len(one.fail) > 1


def test_a_part_is_judged_by_limits_that_it_did_not_set() -> None:
    development = {
        item("healthy", "lora", "code"): newlines(0.1),
        item("healthy", "lora", "list"): newlines(0.1),
        item("control", "style", "style", also=("capitals",)): newlines(0.45),
        item("fault", "newlines-70", "code"): newlines(0.9),
    }
    unseen = judged_runs(
        {
            item("healthy", "lora", "code", 10): newlines(0.12),
            item("control", "style", "style", 10, also=("capitals",)): newlines(0.4),
            item("fault", "newlines-70", "code", 10): newlines(0.45),
        }
    )
    rows = {
        (row[0], row[1]): row[2:]
        for row in left_out(unseen.harmful, unseen.healthy, development).rows
    }
    gone, held, hurt, before, fine, frozen, told = rows["task", "style"]
    # With style: newlines > 0.5 as frozen. Without: > 0.25 and > base + 0.15, which its 0.4 is.
    assert (gone, held, hurt, before, told) == (1, 2, "-", "-", "text.newlines")
    assert (fine[:6], frozen[:6]) == ("1 of 1", "0 of 1")  # type: ignore[index]
    assert rows["healthy kind", "style"][4][:6] == "1 of 1"  # type: ignore[index]
    gone, held, hurt, before, fine, frozen, told = rows["task", "code"]
    assert (gone, held, hurt[:6], before[:6], fine[:6]) == (1, 0, "0 of 1", "0 of 1", "0 of 1")  # type: ignore[index]
    assert rows["task", "all, each in turn (2)"][4][:6] == "1 of 2"  # type: ignore[index]
    # Two kinds, but one run.
    assert rows["healthy kind", "capitals"][4][:6] == "1 of 1"  # type: ignore[index]
    assert rows["healthy kind", "all, each in turn (3)"][4][:6] == "1 of 2"  # type: ignore[index]
    # Nobody sets a limit on a fault, nor without development runs.
    assert rows["family of faults", "data"][:2] == [0, 0]
    assert "family of faults" not in {what for what, name in rows if name.startswith("all, ")}
    none = left_out(unseen.harmful, unseen.healthy, {})
    assert (list(none.rows), len(none.notes)) == ([], 1)


def test_a_part_that_set_no_limits_is_in_no_row_of_all() -> None:
    development = {
        item("healthy", "lora", "code"): newlines(0.1),
        item("healthy", "lora", "word"): {"error": "RuntimeError: no"},
        item("healthy", "lslora", "code"): newlines(0.1),
    }
    unseen = judged_runs(
        {
            item("healthy", "lora", "code", 10): newlines(0.1),
            item("healthy", "lora", "word", 10): newlines(0.1),
            item("healthy", "lora", "row", 10): newlines(0.4),
            item("fault", "shuffled", "row", 10): newlines(0.4),
            item("fault", "spline-tanh", "code", 10): newlines(0.1),
        }
    )
    made = left_out(unseen.harmful, unseen.healthy, development)
    rows = {(row[0], row[1]): row[2:] for row in made.rows}
    gone = {name: cells[0] for (_, name), cells in rows.items() if not name.startswith("all, ")}  # type: ignore[union-attr]
    assert gone == {"code": 2, "word": 0, "row": 0, "data": 0, "spline": 1, "lora": 1}
    # Its own row is there.
    assert rows["task", "row"][4][:6] == "1 of 1"  # type: ignore[index]
    for what, total in (("task", "0 of 1"), ("healthy kind", "1 of 3")):
        assert rows[what, "all, each in turn (1)"][4][:6] == total  # type: ignore[index]
    assert rows["family of faults", "all, each in turn (1)"][2][:6] == "0 of 1"  # type: ignore[index]


def test_with_a_family_go_the_healthy_runs_that_its_faults_alone_are_set_beside() -> None:
    mine = {
        item("fault", "spline-tanh"): 0,
        item("healthy", "lslora", also=("other",)): 0,
        item("healthy", "lora", also=("zero-b", "code")): 0,
    }
    found = {(part.what, part.name): part for part in parts(mine)}
    assert {what for what, _ in found} == {"task", "family of faults", "healthy kind"}
    assert [one.name for one in mine if found["family of faults", "spline"].holds(one)] == [
        "spline-tanh", "lslora",
    ]  # fmt: skip
    assert [one.name for one in mine if found["healthy kind", "zero-b"].holds(one)] == ["lora"]
    assert ("family of faults", "data") not in found


def test_no_rule_set_on_runs_fails_one_of_them_that_the_frozen_ones_pass() -> None:
    random = Random(0)
    names = {condition.value for one in RULES for condition in one.fail}
    healthy = {
        item("healthy", "lora", seed=seed): record(
            readings=readings(
                {
                    step: {
                        name: random.random()
                        for value in names
                        for name in (value, f"base.{value}")
                        if value not in ("train.step",)
                    }
                    for step in (0, 5, 10)
                }
            )
        )
        for seed in range(20)
    }
    rules = Setting(healthy).without(lambda _: False)
    assert limits_of(rules) != limits_of(RULES)
    for one in healthy.values():
        before = {f.rule for f in judged(one, None, None, {}).seen if f.severity == "fail"}
        after = {f.rule for f in judged(one, None, None, {}, rules).seen if f.severity == "fail"}
        assert after <= before


def limits_of(rules: Sequence[Rule]) -> list[float]:
    return [value for one in rules for value in limits(one)]
