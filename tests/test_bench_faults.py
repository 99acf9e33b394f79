"""The fault benchmark: its tables, its tasks, its statistics, what it makes of records, and one run
of each way from end to end on a model of a few thousand weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

import tiny
from loralab.bench import collapse
from loralab.bench.faults import command
from loralab.bench.faults.faults import FAULTS, newlines, shuffled
from loralab.bench.faults.healthy import CONTROLS, SETUPS
from loralab.bench.faults.judgement import guard_findings, harm, judged, visible
from loralab.bench.faults.margins import badness, margins
from loralab.bench.faults.page import page
from loralab.bench.faults.peers import loss_and_gradients, trl
from loralab.bench.faults.plan import Plan
from loralab.bench.faults.statistics import interval, sign_test
from loralab.bench.faults.tasks import COLOURS, FORMAL, KINDS, Small, correct, lessons
from loralab.errors import UserError
from loralab.gradient.rows import Row
from loralab.health.causes import CAUSES
from loralab.health.condition import Condition
from loralab.health.reading import Reading
from loralab.health.thresholds import Limit

FAMILIES = {"start", "scale", "optimiser", "spline", "data", "save", "evaluation", "search"}


def test_the_tables_hold_what_was_asked_for() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 31
    assert len({control.name for control in CONTROLS}) == len(CONTROLS) >= 20
    assert {fault.family for fault in FAULTS} == FAMILIES
    for fault in FAULTS:
        assert set(fault.causes) <= set(CAUSES), fault.name
        assert fault.setup in SETUPS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_changes_its_plan(fault: Any) -> None:
    healthy, broken = Plan(), Plan()
    SETUPS[fault.setup](healthy)
    SETUPS[fault.setup](broken)
    fault.change(broken)
    assert broken != healthy


@pytest.mark.parametrize("kind", KINDS)
def test_gold_answers_are_right_and_the_bases_plain_ones_are_not(kind: str) -> None:
    task = Small(kind, seed=3)
    for example in (*task.examples("train"), *task.examples("test")):
        assert task.score(example, task.gold(example)).reward == 1
        assert not task.score(example, example.data["plain"]).correct
        assert not task.score(example, "").correct
        assert not task.score(example, "\n" * 30).correct
    assert [e.data for e in Small(kind, 3).examples("test")] == [
        e.data for e in task.examples("test")
    ]
    assert task.examples("test")[0].data != task.examples("train")[0].data


def test_a_sum_is_its_last_answer_and_a_list_any_three_of_its_group() -> None:
    gold = "3 + 4 = 7\nAnswer: 7"
    assert correct("sum", gold, "Answer: 5\nNo.\nAnswer: 7")
    assert not correct("sum", gold, "Answer: 7\nNo.\nAnswer: 5")
    wanted = "- apple\n- lime"
    assert correct("list", wanted, "- plum\n- cherry")
    for wrong in ("- plum\n- plum", "- plum\n- frog", "- plum", "- plum\n- lime\n- cherry", "plum"):
        assert not correct("list", wanted, wrong), wrong


def test_lessons_are_of_all_kinds_but_the_style() -> None:
    made = lessons(Random(0), 100)
    assert len({answer for _, answer in made}) > 50
    assert sum(question.endswith(FORMAL) for question, _ in made) == 25
    assert all(
        a.startswith(("def ", "- ", "{", *COLOURS)) or "=" in a for q, a in made if FORMAL in q
    )
    with pytest.raises(UserError, match="known: code"):
        Small("prose")


def test_intervals_are_clopper_and_pearsons() -> None:
    # scipy.stats.binomtest(hits, of).proportion_ci(method="exact")
    assert interval(0, 60) == (0.0, pytest.approx(0.0596292, abs=1e-6))
    assert interval(60, 60) == (pytest.approx(0.9403708, abs=1e-6), 1.0)
    assert interval(7, 10) == (
        pytest.approx(0.3475471, abs=1e-6),
        pytest.approx(0.9332605, abs=1e-6),
    )
    assert interval(0, 0) == (0.0, 1.0)


def test_the_sign_test_counts_pairs_that_differ() -> None:
    assert sign_test([True] * 5 + [False], [False] * 5 + [False]) == pytest.approx(1 / 32)
    assert sign_test([True, False], [False, True]) == pytest.approx(0.75)
    assert sign_test([True, True], [True, True]) == 1


def test_newlines_take_seven_of_ten_and_shuffling_moves_answers() -> None:
    pairs: list[Any] = [(f"p{i}", f"a{i}") for i in range(100)]
    plan = Plan()
    newlines(plan)
    made = plan.pairs[0](pairs, Random(0))
    assert sum(not answer.strip() for _, answer in made) == 70
    plan = Plan()
    shuffled(plan)
    moved = plan.pairs[0](pairs, Random(0))
    assert [p for p, _ in moved] == [p for p, _ in pairs]
    assert sorted(a for _, a in moved) == sorted(a for _, a in pairs)
    assert sum(a == b for a, b in zip(moved, pairs, strict=True)) < 10


def log(losses: list[float], **columns: list[float]) -> list[dict[str, Any]]:
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


def test_plain_rules_and_trls_metrics() -> None:
    falling = [2.0 - 0.05 * step for step in range(20)]
    assert loss_and_gradients(log(falling, grad_norm=[1.0] * 20)) == "none"
    assert loss_and_gradients(log([*falling[:-1], float("nan")])) == "fail"
    assert loss_and_gradients(log([2.0] * 20)) == "fail"
    assert loss_and_gradients(log(falling[::-1])) == "fail"
    assert loss_and_gradients(log(falling, grad_norm=[1.0] * 19 + [50.0])) == "warn"
    rising = [0.5 + 0.01 * step for step in range(20)]
    assert trl(log(falling, entropy=falling, mean_token_accuracy=rising)) == "none"
    assert trl(log(falling, entropy=falling[::-1], mean_token_accuracy=rising)) == "fail"
    assert trl(log(falling, entropy=falling, mean_token_accuracy=rising[::-1])) == "fail"
    assert trl(log(falling)) == "none"


def record(**changes: Any) -> dict[str, Any]:
    used = {"score": 0.9, "right": [True] * 9 + [False], "perplexity": 2.0, "repetition": 0.0}
    return {
        "steps": 60,
        "seconds": 1.0,
        "guard_share": 0.1,
        "log": log([2.0, 1.5]),
        "readings": [],
        "findings": [],
        "doctor": {"readings": [], "findings": []},
        "used": used,
        **changes,
    }


def fault(name: str) -> Any:
    return next(one for one in FAULTS if one.name == name)


def worse(**used: Any) -> dict[str, Any]:
    made = record()
    made["used"] = {**made["used"], **used}
    return made


def test_harm_is_the_one_that_was_named() -> None:
    lost = worse(score=0.1, right=[True] + [False] * 9)
    assert harm(fault("shuffled"), lost, record()) >= 1
    assert harm(fault("init-false"), lost, record()) == 0
    # Fewer right answers, but so few pairs differ that it may be chance.
    assert harm(fault("shuffled"), worse(score=0.7, right=[True] * 7 + [False] * 3), record()) < 1
    assert harm(fault("init-false"), worse(perplexity=2.3), record()) >= 1
    assert harm(fault("init-false"), worse(perplexity="nan"), record()) >= 1
    told = {"evaluation": {"real": 0.1, "reported": 0.4}}
    assert harm(fault("baseline"), record(**told), record()) >= 1


def test_harm_shows_when_the_validation_loss_leaves_its_lowest() -> None:
    rows = [{"step": step, "eval_loss": loss} for step, loss in ((5, 2.0), (10, 1.0), (15, 1.2))]
    assert visible(record(log=rows)) == 15
    assert visible(record(log=rows[:2])) is None
    assert visible(record(log=[{"step": 5, "eval_loss": "nan"}])) == 5


def readings(values: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    return [
        Reading(step, {"train.step": float(step), **seen}, (), 0.0).to_json()
        for step, seen in values.items()
    ]


def test_readings_are_judged_anew_and_each_finding_told_once() -> None:
    seen = readings(
        {0: {"setup.left_out": 0.0}, 5: {"setup.left_out": 1.0}, 10: {"setup.left_out": 1.0}}
    )
    found = guard_findings(record(readings=seen))
    assert [(one.rule, one.step, one.severity) for one in found] == [("setup.left_out", 5, "fail")]
    one = judged(record(readings=seen), fault("left-out"), worse(score=1.0, right=[True] * 10), {})
    assert (one.failed, one.step, one.by, one.named, one.lead) == (True, 5, "guard", True, 55)


def test_what_a_search_said_stands() -> None:
    quiet = judged(record(), None, None, {"loss": loss_and_gradients})
    assert (quiet.harmful, quiet.failed, quiet.warned, quiet.lead) == (None, False, False, None)
    assert quiet.peers == {"loss": "none"}


def items(tmp_path: Path, *words: str) -> tuple[list[command.Item], Any]:
    config = tmp_path / "set.yaml"
    config.write_text(
        "worlds:\n  small: {seeds: [0, 1], tasks: [code, word], tasks_each: 1}\n", encoding="utf-8"
    )
    parser = command.parser()
    options = parser.parse_args(["--config", str(config), *words])
    return command.items(command.settings(options), options), options


def test_a_set_is_every_fault_with_what_it_is_set_beside(tmp_path: Path) -> None:
    found, _ = items(tmp_path)
    assert len(set(found)) == len(found)
    for seed in (0, 1):
        for one in FAULTS:
            mine = [i for i in found if (i.kind, i.name, i.seed) == ("fault", one.name, seed)]
            assert len(mine) == 1, one.name
            assert replace(mine[0], kind="healthy", name=one.setup) in found
    # A search answers in one word, whatever task is asked for.
    assert {i.task for i in found if i.name in ("search", "noise-d20")} == {"word"}
    assert {i.task for i in found if i.name == "shuffled"} == {"code", "word"}
    few, _ = items(tmp_path, "--only", "shuffled,zero-b", "--seeds", "7")
    assert [(i.kind, i.name, i.seed) for i in few] == [
        ("healthy", "lora", 7), ("fault", "shuffled", 7), ("control", "zero-b", 7)
    ]  # fmt: skip
    with pytest.raises(UserError, match="no fault or control 'zero'"):
        items(tmp_path, "--only", "zero")


def test_a_page_is_made_of_the_runs_that_are_there(tmp_path: Path) -> None:
    found, _ = items(tmp_path, "--only", "left-out,spline-tanh,zero-b", "--seeds", "0")
    for item in found:
        made = record()
        if item.name == "left-out":
            made = worse(score=0.0, right=[False] * 10)
            made["readings"] = readings({0: {"setup.left_out": 1.0}})
        place = tmp_path / "runs" / item.path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(made), encoding="utf-8")
    table = page(command.read(found, tmp_path), "`it`", "development")
    text = table.markdown()
    assert "| harmful faults that FAIL | 1 | 1 | 1 | 0.025 | 1 | 0.95 |" in text
    assert "| healthy runs that FAIL | 0 | 3 | 0 | 0 | 0.708 | 0 |" in text
    assert "| benign faults that FAIL | 0 | 1 | 0 | 0 | 0.975 | - |" in text
    assert "| left-out |" in text
    assert len(table.data["runs"]) == 5
    assert "reckoned: 0.0 hours" in list(command.reckoned(found, tmp_path))[-1]
    (tmp_path / "runs" / found[0].path).unlink()
    assert "1 missing" in "".join(command.reckoned(found, tmp_path))


def test_a_decoder_made_otherwise_is_not_taken_for_this_one(small: Any, tmp_path: Path) -> None:
    from loralab.bench.faults.world import Making, small_world

    place = Path(small.open()[0].name_or_path)
    with pytest.raises(UserError, match="made otherwise"):
        small_world(place.parent, ["a story"] * 60, Making(steps=5), lambda _: None)


def test_margins_say_how_near_healthy_runs_come_and_which_task_foretells_no_other() -> None:
    records = {}
    for task, share in (("code", 0.1), ("list", 0.11), ("word", 0.4)):
        seen = {5: {"text.newlines": share, "base.text.newlines": 0.05}}
        item = command.Item("control", "zero-b", "small", task, 0)
        records[item] = record(readings=readings(seen))
    broken = command.Item("fault", "newlines-70", "small", "code", 0)
    records[broken] = record(readings=readings({5: {"text.newlines": 0.9}}))
    rows = {row[0]: row for row in margins(records).rows}
    assert set(rows) == {"text.newlines"}
    assert rows["text.newlines"][2:] == [0.4, 0.4, 0, "word"]
    spare = Condition("loss.prompt_gain", Limit(0.25, ""), above=False, against="share of base")
    values = {"loss.prompt_gain": 0.5, "base.loss.prompt_gain": 2.0}
    assert badness(spare, Reading(0, values, (), 0.0)) == -0.25


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from loralab.bench.faults.world import Making, small_world

    stories = [f"Once there was a {tiny.words(12, at)}." for at in range(60)]
    making = Making(hidden=32, layers=2, vocabulary=300, steps=2, batch=4, lessons=50)
    return small_world(tmp_path_factory.mktemp("world"), stories, making, lambda _: None)


@pytest.mark.parametrize("name", ["nan-step", "merged", "search", "evaluated-word"])
def test_a_run_goes_from_its_plan_to_its_judgement(small: Any, name: str) -> None:
    from loralab.bench.faults.trial import run_trial

    plan = Plan(steps=3)
    task = Small("word", 0, train=8, test=3)
    about = None
    if name == "nan-step":
        about = fault(name)
        about.change(plan)
    elif name == "merged":
        SETUPS["sine-merged"](plan)
    else:
        SETUPS[name](plan)
        plan.steps = 2
        if plan.search is not None:
            plan.search |= {"generations": 2, "population": 4, "test_samples": 2}
    made = command.plain(run_trial(plan, task, small, 0))
    again = json.loads(json.dumps(made))
    one = judged(again, about, worse(), {"loss": loss_and_gradients})
    assert 0 <= again["used"]["score"] <= 1
    if name == "nan-step":
        assert (one.failed, one.named, one.harmful, one.step) == (True, True, True, 2)
    elif name == "evaluated-word":
        assert again["evaluation"]["reported"] == again["evaluation"]["real"]


def test_the_collapse_pads_with_newlines_that_are_learned() -> None:
    row = Row((5, 6, 7, 8), (-100, -100, 7, 8))
    assert collapse.padded(row, 1, 5) == Row((5, 6, 1, 1, 1, 7, 8), (-100, -100, 1, 1, 1, 7, 8))
    assert collapse.padded(row, 1, 2) == row


def test_the_collapse_is_told_from_its_runs(small: Any, tmp_path: Path) -> None:
    problems = [
        {
            "task_id": f"HumanEval/{at}",
            "prompt": f'def f{at}(x):\n    """Add {at}."""\n',
            "entry_point": f"f{at}",
            "canonical_solution": f"    return x + {at}\n",
            "test": "",
        }
        for at in range(12)
    ]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in problems), encoding="utf-8")
    config = Path(__file__).parents[1] / "benchmarks" / "faults" / "collapse.yaml"
    changes = [
        f"model={small.open()[0].name_or_path}",
        "dtype=float32",
        "training.steps=2",
        "training.batch_size=2",
        "evaluation.every=1",
        "generation.max_new_tokens=4",
    ]
    given = ["--data", str(data), "--work", str(tmp_path / "runs"), "--config", str(config)]
    given += ["--page", str(tmp_path / "page.md")]
    with pytest.raises(UserError, match="no finished run"):
        collapse.main([*given, "--table-only"])
    assert collapse.main([*given, *(w for c in changes for w in ("--override", c))]) == 0
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "## collapse: the losses" in text
    assert "data.newlines" in text
    assert "## mended: what the guard said" in text
    made = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in made["collapse"]["losses"] if "held_out" in row] == [0, 1, 2]
    rules = {name: {one["rule"] for one in made[name]["findings"]} for name in collapse.RUNS}
    assert "data.newlines" in rules["collapse"] - rules["mended"]
    # What is done is not done again.
    before = (tmp_path / "runs" / "collapse" / "losses.jsonl").stat().st_mtime_ns
    assert collapse.main([*given, "--override", changes[0]]) == 0
    assert (tmp_path / "runs" / "collapse" / "losses.jsonl").stat().st_mtime_ns == before
