"""The fault benchmark's tables of faults and healthy runs; and the collapse, end to end on a model
of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

import small_world
from loralab.bench import collapse
from loralab.bench.faults.faults import FAULTS, newlines, shuffled
from loralab.bench.faults.healthy import CONTROLS, SETUPS
from loralab.bench.faults.plan import Plan
from loralab.errors import UserError
from loralab.gradient.rows import Row
from loralab.health.causes import CAUSES

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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_world.made(tmp_path_factory.mktemp("world"))


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
