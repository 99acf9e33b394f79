"""The fault benchmark's page, from made-up records: its rates, limits set without a part of the
runs, and the margins that limits are set by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fault_records import (
    doctor,
    item,
    log,
    readings,
    record,
    rule,
    useless,
    validated,
    worse,
)
from loralab.bench.faults import command, sections
from loralab.bench.faults.items import Item, fault_of
from loralab.bench.faults.judgement import judged
from loralab.bench.faults.left_out import left_out, parts
from loralab.bench.faults.limits import NEAREST, SLACK, Seen, Setting, fails, quantity, set_on
from loralab.bench.faults.margins import margins
from loralab.bench.faults.page import page
from loralab.bench.faults.sections import Groups, rate
from loralab.bench.table import Section
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

LEFT_OUT = readings({0: {"setup.left_out": 1.0}})


def table(section: Section) -> dict[Any, dict[str, Any]]:
    """Rows by their first cell, cells by column."""
    return {row[0]: dict(zip(section.columns, row, strict=True)) for row in section.rows}


def section(made: Any, heading: str) -> dict[Any, dict[str, Any]]:
    return table(next(one for one in made.sections if one.heading == heading))


def runs() -> dict[Item, dict[str, Any]]:
    """Four harmful faults (two told, one warned of, one that broke off), one benign, one without a
    run beside it, four healthy runs, of which one is failed and one warned of."""
    after_all = doctor({"data.eos_missing": 1.0, "data.prompted": 1.0})
    warned = doctor({"data.eos_missing": 1.0})
    return {
        item("healthy", "lora", also=("code", "zero-b")): record(),
        item("healthy", "lora", "word"): record(readings=LEFT_OUT),
        item("healthy", "lslora", seed=1): record(doctor=warned),
        item("control", "style", "style"): record(),
        item("fault", "left-out"): useless(
            readings=readings({0: {}, 5: {"setup.left_out": 1.0}}),
            log=[*log([2.0, 2.0]), *validated({0: 2.0, 30: 2.0, 60: 2.0})],
        ),
        item("fault", "eos-masked"): useless(doctor=after_all),
        item("fault", "shuffled", "word"): useless(doctor=warned),
        item("fault", "template", "word"): {"error": "RuntimeError: no"},
        item("fault", "spline-tanh", seed=1): record(),
        item("fault", "spline-soft", seed=2): useless(readings=LEFT_OUT),
    }


def test_a_rate_is_told_with_its_interval() -> None:
    assert rate([True] * 7 + [False] * 3) == "7 of 10: 0.7 (0.35 to 0.93)"
    assert rate([]) == "-"


def test_the_page_counts_each_run_where_it_belongs() -> None:
    wanted = [*runs(), item("fault", "lr-x100")]
    made = page(runs(), "`it`", "development", wanted=wanted)
    whole = {row[0]: list(row[1:4]) for row in made.sections[0].rows}
    assert whole == {
        "harmful faults that FAIL": [2, 4, 0.5],
        "healthy runs that FAIL": [1, 4, 0.25],
        "right cause among the first two, of harmful that FAIL": [2, 2, 1.0],
        "the same, of all harmful": [2, 4, 0.5],
        # shuffled is not told at all, eos-masked at the end, which its loss never shows.
        "FAIL before the validation loss shows it, of harmful in the training": [
            2, 3, pytest.approx(2 / 3),
        ],
        "harmful faults that WARN alone": [1, 4, 0.25],
        "healthy runs that WARN alone": [1, 4, 0.25],
        "benign faults that FAIL": [0, 1, 0.0],
        "benign faults that WARN alone": [0, 1, 0.0],
    }  # fmt: skip
    assert made.facts["runs"].endswith(
        "1 broke off, 1 faults without a run to set them beside, 1 not run"
    )
    counted = section(made, "Not counted")
    assert counted["small/word/fault-template-0.json"]["what"] == "broke off; counted as missed"
    assert counted["small/code/fault-spline-soft-2.json"]["how"] == "told: FAIL"
    assert counted["small/code/fault-lr-x100-0.json"]["what"] == "not run"
    mixed = page(runs(), "`it`", "development", differing=3)
    assert mixed.facts["runs"].endswith("3 of another plan or version were found")
    assert json.loads(made.raw())["runs"][0]["name"] == "lora"


def test_rates_by_task_and_family_are_of_their_own_runs() -> None:
    made = page(runs(), "`it`", "unseen")
    tasks = section(made, "By task")
    assert tasks["code"]["harmful FAIL (95 %)"].startswith("2 of 2: 1 ")
    assert tasks["word"]["harmful FAIL (95 %)"].startswith("0 of 2: 0 ")
    assert (tasks["word"]["harmful WARN alone"], tasks["code"]["healthy WARN alone"]) == (1, 1)
    assert tasks["word"]["healthy FAIL (95 %)"].startswith("1 of 1")
    # left-out is told after 5 steps and shows after 60, eos-masked at the end and never.
    assert (tasks["code"]["steps to FAIL"], tasks["code"]["lead"]) == (32.5, 27.5)
    assert "style" in tasks
    families = section(made, "By family of faults")
    assert set(families) == {"optimiser", "spline", "data"}
    assert families["data"]["harmful FAIL (95 %)"].startswith("1 of 3")
    # Beside data's faults stand plain runs, beside the splines' LS-LoRA.
    assert families["data"]["healthy FAIL (95 %)"].startswith("1 of 2")
    assert families["spline"]["healthy FAIL (95 %)"].startswith("0 of 1")
    assert families["spline"]["benign FAIL, WARN, of"] == "0, 0, 1"


def test_guard_doctor_and_peers_are_each_counted_alone() -> None:
    made = page(runs(), "`it`", "unseen")
    alone = section(made, "Guard and doctor")
    assert alone["guard alone"]["harmful FAIL (95 %)"].startswith("1 of 4")
    assert alone["doctor alone"]["harmful FAIL (95 %)"].startswith("1 of 4")
    assert alone["both"]["harmful FAIL (95 %)"].startswith("2 of 4")
    assert alone["guard alone"]["healthy FAIL (95 %)"].startswith("1 of 4")
    assert alone["doctor alone"]["harmful WARN alone"] == 1


def judged_runs(
    records: Mapping[Item, Mapping[str, Any]], peers: Mapping[str, Any] | None = None
) -> Groups:
    """Groups as the page makes them, harm taken for granted."""
    groups = Groups()
    for one, row in records.items():
        fault = fault_of(one.name) if one.kind == "fault" else None
        made = judged(row, fault, record() if fault else None, peers or {})
        (groups.healthy if fault is None else groups.harmful)[one] = made
    return groups


def test_peers_are_asked_what_they_can_see_and_of_all() -> None:
    search = {"generations": [], "log": log([0.1] * 20)}
    groups = judged_runs(
        {
            item("fault", "left-out"): useless(log=log([2.0] * 20)),
            item("fault", "shuffled"): useless(log=log([2.0] * 20)),
            item("fault", "keys-dropped"): useless(readings=LEFT_OUT, log=log([2.0] * 20)),
            item("fault", "noise-d20", "word"): useless(readings=LEFT_OUT, **search),
            item("fault", "template"): {"error": "no"},
            item("healthy", "lora"): record(log=log([2.0] * 20)),
            item("healthy", "search", "word"): record(**search),
        },
        {"flat": lambda rows: "fail" if rows[-1]["loss"] == 2.0 else "none"},
    )
    rows = {(row[0], row[1]): row[2:] for row in sections.peers(groups, ["flat"]).rows}
    assert rows["flat", "in the log"][0].startswith("2 of 3")  # type: ignore[union-attr]
    assert rows["flat", "in the log"][2].startswith("1 of 1")  # type: ignore[union-attr]
    # keys-dropped came after the log, but what was said of that is counted for whoever said it.
    assert rows["flat", "all"][0].startswith("3 of 5")  # type: ignore[union-attr]
    assert rows["flat", "all"][2].startswith("1 of 2")  # type: ignore[union-attr]
    assert rows["loralab", "in the log"][0].startswith("0 of 3")  # type: ignore[union-attr]
    # Our guard's word before the fault was in is no detection.
    assert rows["loralab", "all"][0].startswith("1 of 5")  # type: ignore[union-attr]
    assert "In 1 runs of faults the guard FAILs before" in sections.whole(groups).notes[-1]
    assert rows["flat", "all"][4:] == ["worse", "better"]
    assert rows["loralab", "all"][4:] == ["-", "-"]


def test_leads_are_told_apart_where_the_loss_ever_shows_it() -> None:
    def told(at: int, losses: Mapping[int, float]) -> dict[str, Any]:
        return useless(
            readings=readings({at: {"setup.left_out": 1.0}}), log=validated({0: 2.0, **losses})
        )

    groups = judged_runs(
        {
            item("fault", "left-out", seed=0): told(0, {20: 3.0}),  # 20 before
            item("fault", "left-out", seed=1): told(10, {20: 3.0}),  # 10 before
            item("fault", "left-out", seed=2): told(30, {20: 3.0}),  # 10 late
            item("fault", "left-out", seed=3): told(10, {60: 1.5}),  # never shown: 50
            item("fault", "left-out", seed=4): useless(log=validated({0: 2.0, 60: 1.5})),  # missed
            item("fault", "alpha-changed"): told(5, {20: 3.0}),  # after the training
        }
    )
    rows = table(sections.leads(groups, {"left-out": fault_of("left-out")}))
    assert rows["all"]["FAIL before the loss shows it (95 %)"].startswith("3 of 5")
    assert (rows["optimiser"]["loss shows it in"], rows["all"]["lead there"]) == (3, 10)
    assert (rows["all"]["never in"], rows["all"]["lead there, at least"]) == (2, 50)
    assert rows["all"]["steps from injection to FAIL"] == 10
    note = sections.whole(groups).notes[1]
    # 20, 10, -10, 50, and one missed.
    assert "15 steps over 4 runs that FAIL, 10 with the 1 missed as the worst" in note


def test_costs_are_of_runs_by_gradients_and_of_searches() -> None:
    groups = judged_runs(
        {
            item("healthy", "lora", seed=0): record(guard_share=0.1),
            item("healthy", "lora", seed=1): record(guard_share=0.3, guard_seconds=4.0),
            item("healthy", "search"): record(generations=[], guard_share=None),
        }
    )
    rows = sections.costs(groups.healthy).rows
    assert list(rows[0][1:7]) == ["gradients", 2, 0.2, 0.3, 2.5, 4.0]
    assert list(rows[1][1:5]) == ["search", 1, None, None]


# Limits set on healthy runs.


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


def newlines(share: float) -> dict[str, Any]:
    return record(readings=readings({5: {"text.newlines": share, "base.text.newlines": 0.0}}))


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


def test_limits_are_set_on_development_runs_and_on_no_others() -> None:
    alone = page(runs(), "`it`", "unseen")
    assert "No healthy development runs" in alone.markdown()
    assert section(page(runs(), "`it`", "development"), "Left out one at a time")
    both = page(runs(), "`it`", "unseen", development=runs())
    assert "4 healthy development runs" in both.markdown()


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


# Margins.


def test_margins_say_how_near_healthy_runs_come_and_how_far_faults_go() -> None:
    records = {
        item("control", "zero-b", task): newlines(share)
        for task, share in (("code", 0.1), ("list", 0.11), ("word", 0.4))
    }
    records[item("healthy", "lora", "code")] = newlines(0.05)
    far = {"text.newlines": 0.9, "base.text.newlines": 0.0}
    records[item("fault", "newlines-70", "code")] = useless(readings=readings({5: far, 10: {}}))
    # Not harmful, so nothing that has to be told; and a fault of another cause.
    records[item("healthy", "lora", "word")] = newlines(0.0)
    records[item("fault", "newlines-70", "word")] = newlines(0.3)
    records[item("fault", "shuffled", "code")] = useless(readings=readings({5: far}))
    made = margins(records)
    rows = [row for row in made.rows if row[0] == "text.newlines"]
    assert [row[1] for row in rows] == ["text.newlines > 0.5", "text.newlines > base + 0.3"]
    assert rows[0][2:] == [
        "0.4 (small/word/control-zero-b-0, step 5)",
        "0.4 (small/word/control-zero-b-0, step 5)",
        0,
        "newlines-70 0.9 to 0.9 (1 of 1)",
        "word",
    ]
    # No healthy one has newlines > 0.5.
    assert rows[1][3] == "-"
    assert "Of 5 healthy runs, 5 readings" in made.intro
    assert "2 runs of faults that do harm, of 3" in made.intro


def test_margins_read_generations_of_searches() -> None:
    numbers = {"es.informative": 0.3, "es.correct": 0.5, "es.distinct": 0.6}
    records = {
        item("healthy", "search", "word"): record(
            generations=[], numbers=readings({4: numbers, 5: numbers | {"es.distinct": 0.2}})
        )
    }
    rows = {row[1]: row[2] for row in margins(records).rows if row[0] == "es.silent"}
    assert rows["es.distinct < 0.1"] == "0.2 (small/word/healthy-search-0, step 5)"


def test_a_page_can_be_made_of_files_alone(tmp_path: Path) -> None:
    made = {item("healthy", "lora"): record(), item("fault", "left-out"): worse(score=0.0)}
    for one, row in made.items():
        place = tmp_path / "runs" / one.path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(row), encoding="utf-8")
    options = command.parser().parse_args(["--any-version"])
    asked = command.settings(command.parser().parse_args([]))
    found, others = command.read(list(made), tmp_path, asked, options)
    assert others == 2, "nobody says what measured them"
    assert page(found, "`it`", "unseen").markdown() == page(made, "`it`", "unseen").markdown()
