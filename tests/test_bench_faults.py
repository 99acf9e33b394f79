"""The fault benchmark's tables of faults and healthy runs."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from loralab.bench.faults.faults import FAULTS, newlines, shuffled
from loralab.bench.faults.healthy import CONTROLS, SETUPS
from loralab.bench.faults.plan import Plan
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
