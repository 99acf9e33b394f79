"""The fault benchmark's page, from made-up records: its rates, and whose they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fault_records import (
    doctor,
    item,
    judged_runs,
    log,
    readings,
    record,
    section,
    table,
    useless,
    validated,
    worse,
)
from loralab.bench.faults import command, sections
from loralab.bench.faults.items import Item, fault_of
from loralab.bench.faults.page import page
from loralab.bench.faults.sections import rate

LEFT_OUT = readings({0: {"setup.left_out": 1.0}})


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


def test_limits_are_set_on_development_runs_and_on_no_others() -> None:
    alone = page(runs(), "`it`", "unseen")
    assert "No healthy development runs" in alone.markdown()
    assert section(page(runs(), "`it`", "development"), "Left out one at a time")
    both = page(runs(), "`it`", "unseen", development=runs())
    assert "4 healthy development runs" in both.markdown()
