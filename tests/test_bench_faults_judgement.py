"""What records of faulty and healthy runs mean: records made up, numbers reckoned by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from fault_records import doctor, log, readings, record, rule, useless, validated, worse
from loralab.bench.faults import peers
from loralab.bench.faults.faults import FAULTS
from loralab.bench.faults.items import fault_of
from loralab.bench.faults.judgement import (
    doctor_findings,
    guard_findings,
    harm,
    injected,
    judged,
    visible,
)
from loralab.bench.faults.peers import loss_and_gradients, trl
from loralab.bench.faults.statistics import interval, sign_test
from loralab.health.findings import Finding
from loralab.health.thresholds import Limit


def test_intervals_are_clopper_and_pearsons() -> None:
    # scipy.stats.binomtest(hits, of).proportion_ci(method="exact")
    assert interval(0, 60) == (0.0, pytest.approx(0.0596292, abs=1e-6))
    assert interval(60, 60) == (pytest.approx(0.9403708, abs=1e-6), 1.0)
    assert interval(7, 10) == (
        pytest.approx(0.3475471, abs=1e-6),
        pytest.approx(0.9332605, abs=1e-6),
    )
    assert interval(0, 0) == (0.0, 1.0)
    # 0 of n: 1 - 0.025^(1/n), whatever n.
    assert interval(0, 5000)[1] == pytest.approx(1 - 0.025 ** (1 / 5000), rel=1e-6)
    low, high = interval(2500, 5000)
    assert low == pytest.approx(1 - high, abs=1e-9)


def test_the_sign_test_counts_pairs_that_differ() -> None:
    assert sign_test([True] * 5 + [False], [False] * 5 + [False]) == pytest.approx(1 / 32)
    assert sign_test([True, False], [False, True]) == pytest.approx(0.75)
    assert sign_test([True, True], [True, True]) == 1


def test_plain_rules_and_trls_metrics() -> None:
    falling = [2.0 - 0.05 * step for step in range(20)]
    assert loss_and_gradients(log(falling, grad_norm=[1.0] * 20)) == "none"
    assert loss_and_gradients(log([*falling[:-1], float("nan")])) == "fail"
    assert loss_and_gradients(log([2.0] * 20)) == "fail"
    assert loss_and_gradients(log([0.0] * 20)) == "fail"
    assert loss_and_gradients(log(falling[::-1])) == "fail"
    assert loss_and_gradients(log(falling, grad_norm=[1.0] * 19 + [50.0])) == "warn"
    rising = [0.5 + 0.01 * step for step in range(20)]
    assert trl(log(falling, entropy=falling, mean_token_accuracy=rising)) == "none"
    assert trl(log(falling, entropy=falling[::-1], mean_token_accuracy=rising)) == "fail"
    assert trl(log(falling, entropy=falling, mean_token_accuracy=rising[::-1])) == "fail"
    assert trl(log(falling)) == "none"


def test_trainproof_is_handed_the_file_that_its_command_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import json
    from pathlib import Path

    read: list[Any] = []

    def check_epoch(path: Path, fmt: str) -> dict[str, Any]:
        read.append((path.name, fmt, json.loads(path.read_text(encoding="utf-8"))["log_history"]))
        return {"verdict": "WARN"}

    module = ModuleType("trainproof.epoch")
    module.check_epoch = check_epoch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trainproof", ModuleType("trainproof"))
    monkeypatch.setitem(sys.modules, "trainproof.epoch", module)
    losses = [float(step) for step in range(1, 52)]
    rows = [*log(losses, grad_norm=losses), *validated({51: 1})]
    assert peers.trainproof(rows) == "warn"
    assert peers.trainproof_sparse(rows) == "warn"
    (name, kind, whole), (_, _, sparse) = read
    assert (name, kind, whole) == ("trainer_state.json", "hf", rows)
    assert sparse[0] == {"step": 5, "loss": 3.0, "grad_norm": 5.0}
    assert (len(sparse), sparse[-1]) == (11, rows[-1])
    # A short run keeps ten rows.
    peers.trainproof_sparse(log(losses[:29]))
    assert [row["step"] for row in read[-1][2]] == list(range(2, 29, 2))
    peers.trainproof_sparse(log(losses[:6]))
    assert len(read[-1][2]) == 6


def test_trainproof_itself_tells_a_divergence_from_a_fall() -> None:
    pytest.importorskip("trainproof")
    falling = [3.0 * 0.95**step for step in range(60)]
    norms = [1.0] * 60
    rates = [1e-3] * 60
    assert peers.trainproof(log(falling, grad_norm=norms, learning_rate=rates)) == "none"
    assert peers.trainproof(log(falling[::-1], grad_norm=norms, learning_rate=rates)) == "fail"
    assert peers.trainproof(log(falling, grad_norm=["nan"] * 60, learning_rate=rates)) == "fail"  # type: ignore[list-item]
    assert {"trainproof", "trainproof, sparse log"} < set(peers.peers())


def test_harm_is_the_one_that_was_named() -> None:
    lost = worse(score=0.1, right=[True] + [False] * 9)
    assert harm(fault_of("shuffled"), lost, record()) >= 1
    assert harm(fault_of("init-false"), lost, record()) == 0
    # Fewer right answers, but so few pairs differ that it may be chance.
    few = worse(score=0.7, right=[True] * 7 + [False] * 3)
    assert harm(fault_of("shuffled"), few, record()) < 1
    assert harm(fault_of("init-false"), worse(perplexity=2.3), record()) >= 1
    assert harm(fault_of("init-false"), worse(perplexity="nan"), record()) >= 1
    told = {"evaluation": {"real": 0.1, "reported": 0.4}}
    assert harm(fault_of("baseline"), record(**told), record()) >= 1


def test_harm_shows_when_the_validation_loss_leaves_its_lowest() -> None:
    losses = {5: 2.0, 10: 1.0, 15: 1.2}
    assert visible(record(log=validated(losses))) == 15
    assert visible(record(log=validated({5: 2.0, 10: 1.0, 15: 1.09}))) is None
    assert visible(record(log=validated({5: "nan"}))) == 5


def test_harm_shows_in_a_validation_loss_over_that_of_the_run_without_it() -> None:
    healthy = record(log=validated({0: 2.0, 5: 1.5, 10: 1.0}))
    garbled = record(log=validated({0: 9.0, 5: 4.0, 10: 3.0}))
    assert visible(garbled) is None
    assert visible(garbled, healthy) == 0
    # Not learning: at the start nothing tells it apart.
    still = record(log=validated({0: 2.0, 5: 2.0, 10: 2.0}))
    assert visible(still, healthy) == 5
    assert visible(record(log=validated({0: 2.0, 5: 1.6})), healthy) is None
    one = judged(garbled, fault_of("init-false"), healthy, {})
    assert (one.shown, one.before_the_loss) == (0, False)
    # Told at the same step is not told before.
    at_once = garbled | {"readings": readings({0: {"setup.left_out": 1.0}})}
    two = judged(at_once, fault_of("init-false"), healthy, {})
    assert (two.step, two.shown, two.lead, two.before_the_loss) == (0, 0, 0, False)


def test_faults_come_in_at_the_start_at_a_step_or_after_the_training() -> None:
    after = {fault.name for fault in FAULTS if injected(fault, 60) is None}
    assert after == {
        "alpha-changed", "sine-merge", "keys-dropped", "keys-dropped-spline",
        "reads-context", "first-match", "baseline", "exploitable",
    }  # fmt: skip
    late = {fault.name: at for fault in FAULTS if (at := injected(fault, 60))}
    assert late == {"nan-step": 15}
    assert injected(fault_of("short-pays"), 16) == 0
    told = doctor({"parity.keys_missing": 2.0})
    late_one = judged(useless(doctor=told), fault_of("keys-dropped"), record(), {})
    assert (late_one.failed, late_one.step) == (True, 60)
    assert (late_one.delay, late_one.lead, late_one.has_validation) == (None, None, False)
    hurt = readings({15: {}, 25: {"setup.left_out": 1.0}})
    assert judged(useless(readings=hurt), fault_of("nan-step"), record(), {}).delay == 10


def test_what_a_guard_says_before_the_fault_is_in_counts_for_nothing() -> None:
    false = {"setup.left_out": 1.0}
    early = judged(
        useless(readings=readings({0: {}, 5: false, 25: false})), fault_of("nan-step"), record(), {}
    )
    assert [one.step for one in early.early] == [5]
    assert (early.failed, early.guard, early.step, early.delay, early.lead, early.by) == (
        False, None, None, None, None, "",
    )  # fmt: skip
    assert (early.before_the_loss, early.causes, early.rules) == (False, (), ())
    # The first that counts is the first after it.
    late = {15: false | {"train.nonfinite": 1.0}}
    again = judged(
        useless(readings=readings({5: false} | late)), fault_of("nan-step"), record(), {}
    )
    assert (again.step, again.delay, again.lead, again.named) == (15, 0, 45, True)
    assert again.rules == ("numbers.nan",)
    # A fault in what is saved is in no training.
    saved = useless(readings=readings({5: false}), doctor=doctor({"parity.keys_missing": 2.0}))
    after = judged(saved, fault_of("keys-dropped"), record(), {})
    assert (after.guard, after.doctor, after.step, after.by) == (None, "fail", 60, "doctor")
    assert after.rules == ("parity.keys_missing",)
    # Of a healthy run every word counts.
    assert judged(record(readings=readings({5: false})), None, None, {}).step == 5


def test_readings_are_judged_anew_and_each_finding_told_once() -> None:
    seen = readings(
        {0: {"setup.left_out": 0.0}, 5: {"setup.left_out": 1.0}, 10: {"setup.left_out": 1.0}}
    )
    found = guard_findings(record(readings=seen))
    assert [(one.rule, one.step, one.severity) for one in found] == [("setup.left_out", 5, "fail")]
    one = judged(useless(readings=seen), fault_of("left-out"), record(), {})
    assert (one.harmful, one.failed, one.step, one.by, one.named) == (True, True, 5, "guard", True)
    assert (one.delay, one.lead, one.shown, one.before_the_loss) == (5, 55, None, True)
    assert (one.guard, one.doctor) == ("fail", None)
    quiet = judged(record(), None, None, {"loss": loss_and_gradients})
    assert (quiet.harmful, quiet.failed, quiet.warned, quiet.lead) == (None, False, False, None)
    assert quiet.peers == {"loss": "none"}


def test_the_doctor_comes_after_the_last_step_and_warnings_are_no_failure() -> None:
    told = doctor({"data.eos_missing": 1.0, "data.prompted": 1.0})
    one = judged(useless(doctor=told), fault_of("eos-masked"), record(), {})
    assert (one.step, one.delay, one.lead, one.by) == (60, 60, 0, "doctor")
    assert (one.guard, one.doctor, one.failed, one.named) == (None, "fail", True, True)
    mild = judged(
        record(doctor=doctor({"data.eos_missing": 1.0})), fault_of("eos-masked"), record(), {}
    )
    assert (mild.harmful, mild.failed, mild.warned, mild.step) == (False, False, True, None)
    assert mild.rules == ("data.eos_missing",)


def test_other_limits_judge_the_same_readings_otherwise() -> None:
    strict = rule("setup.left_out")
    (condition,) = strict.fail
    lax = replace(strict, fail=(replace(condition, limit=Limit(2.0, "")),))
    seen = record(
        readings=readings({0: {"setup.left_out": 1.0}}), doctor=doctor({"weights.dead": 1.0})
    )
    assert {one.rule for one in guard_findings(seen)} == {"setup.left_out"}
    assert guard_findings(seen, [lax]) == []
    assert {one.rule for one in doctor_findings(seen)} == {"init.zero_factors"}
    assert doctor_findings(seen, [lax]) == []


def test_what_was_read_in_files_stands_whatever_rule_it_is_named_by() -> None:
    def said(name: str, **numbers: float) -> dict[str, Any]:
        told = Finding(name, "fail", 0, "", numbers, "numbers.nan", (), "")
        return told.to_json()

    files = [said("weights.nan", tensors=4.0), said("file.corrupt"), said("parity.keys_missing")]
    judged_then = said("weights.dead", **{"weights.dead": 1.0, "limit.weights.dead": 0.5})
    found = doctor_findings(record(doctor=doctor(findings=[*files, judged_then])))
    assert [one.rule for one in found] == ["weights.nan", "file.corrupt", "parity.keys_missing"]
    # Read in files and measured too: once.
    both = doctor({"weights.nan": 3.0}, findings=files[:1])
    assert [one.rule for one in doctor_findings(record(doctor=both))] == ["weights.nan"]


def test_a_search_is_judged_by_its_texts_and_by_each_generation_alone() -> None:
    texts = {"text.newlines": 0.9, "base.text.newlines": 0.1}
    silent = {"es.informative": 0.0, "es.correct": 0.0, "es.distinct": 0.0}
    told = useless(
        steps=16,
        generations=[{"generation": at} for at in range(8)],
        numbers=readings({4: silent, 5: silent, 6: {}, 7: silent}),
        readings=readings({0: {}, 5: texts, 10: texts}),
        findings=[],
    )
    found = [(one.rule, one.step) for one in guard_findings(told) if one.severity == "fail"]
    assert found == [("es.silent", 4), ("text.newlines", 5), ("es.silent", 7)]
    one = judged(told, fault_of("noise-d20"), record(), {"loss": loss_and_gradients})
    assert (one.step, one.delay, one.named) == (4, 4, True)
    # No training by gradients, so no log for those who read one, and no validation loss.
    assert one.peers == {}
    silent_log = judged(
        told | {"log": log([0.1] * 16)}, fault_of("noise-d20"), record(), {"x": trl}
    )
    assert (silent_log.has_validation, silent_log.lead, silent_log.peers) == (False, None, {})


def test_a_faulty_run_that_broke_off_is_harmful_and_missed() -> None:
    gone = {"error": "RuntimeError: no"}
    one = judged(gone, fault_of("left-out"), record(), {"loss": loss_and_gradients})
    assert (one.harmful, one.failed, one.step, one.lead) == (True, False, None, None)
    assert (one.has_validation, one.before_the_loss, one.peers) == (False, False, {})
    assert judged(gone, None, None, {}).harmful is None
