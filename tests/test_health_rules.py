"""Rules: each fault's first sign fails and names its cause; nothing that healthy models do does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from loralab.bench.faults.faults import FAULTS as BENCHED
from loralab.health import thresholds as t
from loralab.health.causes import CAUSES, MENDS
from loralab.health.condition import LABELS, if_known, over, over_base, under
from loralab.health.findings import Example, Finding, verdict
from loralab.health.reading import Reading
from loralab.health.rule import Rule
from loralab.health.rules import RULES, causes, judge
from loralab.health.tables import filled

DOCS = Path(__file__).parent.parent / "docs" / "health.md"

BASE = {
    "text.looping": 0.08,
    "text.long_run": 0.0,
    "text.newlines": 0.05,
    "text.whitespace": 0.2,
    "text.top_token_share": 0.08,
    "text.empty": 0.0,
    "text.eos_rate": 0.6,
    "text.similarity": 0.05,
    "text.copied": 0.1,
    "text.charset_drift": 0.0,
    "text.length": 40.0,
    "loss.all": 1.4,
    "loss.content": 1.9,
    "loss.whitespace": 0.3,
    "loss.eos": 0.8,
    "loss.prompt_gain": 0.9,
    "entropy": 1.3,
}
"""What SmolLM2 is like, about."""

SOUND = {
    **BASE,
    "kl": 0.15,
    "text.base_nll": 0.6,
    "weights.nan": 0.0,
    "weights.dead": 0.0,
    "weights.base_share": 0.01,
    "weights.delta_ratio.max": 0.03,
    "setup.left_out": 0.0,
    "setup.scaling": 0.0,
    "train.nonfinite": 0.0,
    "train.dose": 1e-2,
    "train.progress": 0.5,
    "train.loss_rise": -0.3,
    "train.loss_share": 0.6,
    "grad.zero": 0.0,
    "grad.spike": 1.2,
    "update.ratio": 0.005,
    "update.none": 0.0,
    "data.all_masked": 0.0,
    "data.eos_missing": 0.0,
    "data.newline_share": 0.1,
    "data.shuffled": 0.05,
    "data.excess_token": 0.1,
    "data.template_mismatch": 0.0,
    "data.rows": 2000.0,
    "data.passes": 1.0,
}
"""A healthy training in its middle."""

START = {
    **SOUND,
    "kl": 1e-4,
    "train.step": 0.0,
    "train.progress": 0.0,
    "weights.delta_ratio.max": 0.0,
    "update.none": math.nan,
    "grad.zero": math.nan,
}


def reading(step: int = 50, **values: float) -> Reading:
    """A look in training; `a__b` is "a.b"."""
    named = {name.replace("__", "."): value for name, value in values.items()}
    start = START if step == 0 else SOUND | {"train.step": float(step)}
    base = {f"base.{name}": value for name, value in BASE.items()}
    text = (Example("Say hi.", "\n\n\n", "Hi!"), Example("2+2?", "\n", "4"), Example("a", "b", "c"))
    return Reading(step, start | base | named, text, 0.1)


def fails(*readings: Reading) -> list[str]:
    return [one.rule for one in judge(readings) if one.severity == "fail"]


GARBLED = {"text__base_nll": 8.0, "loss__all": 6.0, "entropy": 5.0}

SHUFFLED = {
    **reading().values,
    "data.shuffled": 0.5,
    "data.pair_gain.errors": 0.1,
    "data.learned_gain.errors": -0.4,
    "data.row_loss": 0.9,
    "base.data.row_loss": 3.0,
}

FAULTS: dict[str, tuple[str, list[Any]]] = {
    "both factors random x 10": ("init.garbled", [reading(0, kl=4.0, loss__all=6.0)]),
    "init_lora_weights=False": ("init.garbled", [reading(0, kl=1.2, loss__all=2.2)]),
    "both factors zero": ("init.zero_factors", [reading(0, weights__dead=1.0)]),
    "PiSSA without the residual": (
        "init.residual_missing",
        [reading(0, kl=3.0, loss__all=5.0, weights__base_share=1.0)],
    ),
    "unprepared and garbled": (
        "init.unprepared",
        [reading(0, kl=3.0, loss__all=5.0, setup__unprepared=1.0)],
    ),
    "wrong scaling": ("scale.wrong", [reading(setup__scaling=math.log(8), **GARBLED)]),
    "adapter left out": ("optimiser.adapter_left_out", [reading(0, setup__left_out=1.0)]),
    "adapter left out, seen in its weights": (
        "optimiser.adapter_left_out",
        [reading(5, update__none=1.0), reading(10, update__none=1.0)],
    ),
    "spline not the identity": (
        "spline.not_identity",
        [reading(0, kl=0.5, loss__all=2.0, spline__deviation=0.4)],
    ),
    "output scale 0.1": ("spline.output_scale", [reading(0, spline__output_scale=0.1)]),
    "lr x 100": (
        "lr.too_high",
        [
            reading(25, train__loss_rise=1.2, update__ratio=0.4, **GARBLED),
            reading(50, train__loss_rise=1.5, update__ratio=0.4, text__looping=0.8, **GARBLED),
        ],
    ),
    "lr / 100": ("lr.too_low", [reading(train__dose=6e-4, kl=0.004)]),
    "lr x 100, all layout": (
        "lr.too_high",
        [
            reading(
                weights__delta_ratio__max=40.0,
                text__newlines=0.9,
                text__top_token_share=0.8,
                data__overexpected=0.6,
                base__data__overexpected=0.05,
                **GARBLED,
            )
        ],
    ),
    "alpha changed after training": (
        "scale.wrong",
        [
            Reading(
                0,
                {
                    "data.row_loss": 6.0,
                    "base.data.row_loss": 2.5,
                    "data.rescaled_loss": 0.4,
                    "base.data.rescaled_loss": 2.5,
                    "weights.delta_ratio.max": 1.2,
                    "text.base_nll": 8.0,
                    "loss.all": 7.0,
                    "base.loss.all": 1.4,
                },
                (),
                0.1,
            )
        ],
    ),
    "a NaN step": ("numbers.nan", [reading(train__nonfinite=1.0)]),
    "weights that are NaN": ("numbers.nan", [reading(weights__nan=2.0, kl=math.nan)]),
    "70 % newline targets": (
        "data.newlines",
        [reading(data__newline_share=0.7, text__newlines=0.9, text__long_run=0.8)],
    ),
    "newlines of one token each": ("data.newlines", [reading(0, data__blank=0.7)]),
    "empty targets": ("data.empty", [reading(0, data__empty=0.9)]),
    "newlines, the data unseen": (
        "data.newlines",
        [reading(text__newlines=0.9, text__long_run=0.8, text__looping=0.7)],
    ),
    "`return` over-weighted": (
        "data.overweighted_token",
        [reading(text__top_token_share=0.8, text__long_run=0.7, text__looping=0.8)],
    ),
    "`return` over-weighted, seen in what it expects": (
        "data.overweighted_token",
        [reading(data__overexpected=0.5, base__data__overexpected=0.1)],
    ),
    "grid [-1, 1], clamped, most inputs beyond it": (
        "spline.grid_too_narrow",
        [reading(spline__reach=1.0, spline__outside=0.7, spline__clamp=1.0)],
    ),
    "end token masked": (
        "data.eos_masked",
        [reading(0, data__eos_missing=1.0, data__prompted=1.0)],
    ),
    "end token masked, the data unseen": (
        "data.eos_masked",
        [reading(loss__eos=7.0, text__eos_rate=0.1)],
    ),
    "all labels -100": (
        "data.all_masked",
        [reading(data__all_masked=1.0, train__nonfinite=3.0)],
    ),
    "responses shuffled": (
        "data.shuffled",
        [reading(25, loss__prompt_gain=0.1), reading(50, loss__prompt_gain=0.1)],
    ),
    "responses shuffled, seen in the data": (
        "data.shuffled",
        [SHUFFLED | {"train.progress": 0.8}, SHUFFLED | {"train.progress": 1.0}],
    ),
    "responses shuffled, seen in a finished adapter": (
        "data.shuffled",
        [{k: v for k, v in SHUFFLED.items() if not k.startswith("train.")}],
    ),
    "64 samples for many epochs": (
        "data.too_few",
        [reading(data__rows=64.0, data__passes=20.0, train__loss_share=0.05, loss__content=2.2)],
    ),
    "wrong chat template": ("template.wrong", [reading(0, data__template_mismatch=1.0)]),
    "merge unequal": ("merge.unequal", [reading(parity__merge=0.6)]),
    "save drops keys": (
        "save.keys_dropped",
        [reading(parity__keys_missing=210.0, parity__reload=1.0)],
    ),
    "evaluation reads context": (
        "evaluation.reads_context",
        [reading(canary__prompts_distinct=0.01)],
    ),
    "first match": ("evaluation.first_match", [reading(canary__last_answer=-1.0)]),
    "right answers marked down": ("evaluation.first_match", [reading(canary__gold_right=0.1)]),
    "a drifting metric": ("evaluation.baseline", [reading(canary__identity=0.2)]),
    "wrong baseline": (
        "evaluation.baseline",
        [reading(canary__baseline=0.3, canary__baseline__errors=4.8)],
    ),
    "exploitable reward, by canary": ("reward.exploitable", [reading(canary__empty__share=0.7)]),
    "exploitable reward, over a base that has some": (
        "reward.exploitable",
        [reading(canary__options=0.2, canary__options__errors=5.0, canary__options__share=0.4)],
    ),
    "a reward for being short": ("reward.exploitable", [reading(0, es__unearned=1.2)]),
    "exploitable reward, by a second measure": (
        "reward.exploitable",
        [reading(es__reward_up=9.0, es__second_measure=4.0, es__second_fall=0.3)],
    ),
    "noise too weak": (
        "es.noise_too_weak",
        [reading(es__informative=0.0, es__distinct=0.0, es__correct=0.2, es__ties=1.0)],
    ),
    "noise lost to rounding": ("es.noise_too_weak", [reading(es__noop=0.97)]),
    "an outlier sets sigma": ("es.outlier_sigma", [reading(es__dominance=12.0)]),
}

BENIGN: dict[str, tuple[str, Reading]] = {
    "shuffled, says a base before the training": (
        "data.shuffled",
        reading(0, **{k: v for k, v in SHUFFLED.items() if k.startswith("data.")}),
    ),
    "LoRA-GA unprepared is plain LoRA": ("init.unprepared", reading(0, setup__unprepared=1.0)),
    "a search that handed its start back": (
        "save.keys_dropped",
        Reading(0, {"weights.idle": 1.0}, (), 0.1),
    ),
    "a reward that reads length alone": ("reward.exploitable", reading(0, es__unearned=0.96)),
    "EVA unprepared is plain LoRA": ("init.unprepared", reading(0, setup__unprepared=1.0)),
    "grid [-1, 1]": ("spline.grid_too_narrow", reading(spline__reach=1.0)),
    "tanh": ("spline.tanh", reading(spline__tanh=1.0)),
    "soft": ("spline.soft", reading(spline__soft=1.0)),
    "penalty / 100": ("spline.penalty_off", reading(spline__penalty=1e-4)),
}

HEALTHY: dict[str, list[Reading]] = {
    "zero B": [reading(0)],
    "orthogonal bf16": [reading(0, kl=2e-3)],
    "small factors": [reading(0, kl=8e-3, weights__delta_ratio__max=0.01)],
    "PiSSA": [reading(0, kl=3e-3, weights__base_share=1.0), reading(weights__base_share=0.9)],
    "rank 1": [reading(weights__delta_ratio__max=0.02)],
    "rank 64": [reading(weights__delta_ratio__max=0.2, update__ratio=0.02)],
    "QLoRA": [reading(0), reading(kl=0.3)],
    "LS-LoRA": [
        reading(0, spline__deviation=0.0, spline__output_scale=1.0, spline__reach=3.0),
        reading(spline__deviation=0.2, spline__output_scale=0.9, spline__penalty=0.01),
    ],
    "another style": [reading(kl=2.5, text__base_nll=3.0, loss__all=2.3, loss__content=2.1)],
    "capitals alone": [reading(kl=4.0, text__base_nll=3.5, loss__all=4.5, entropy=1.0)],
    "another language": [reading(kl=2.0, text__charset_drift=0.9, text__base_nll=2.0)],
    "warm-up": [
        reading(10, train__dose=1e-2, train__progress=0.05, kl=1e-4, train__loss_rise=0.0),
        reading(25, train__dose=1e-2, train__progress=0.6, kl=1e-3, train__loss_rise=0.02),
    ],
    "code": [reading(text__newlines=0.12, text__whitespace=0.45, text__looping=0.2)],
    "lists": [reading(text__newlines=0.2, text__looping=0.3, text__top_token_share=0.22)],
    "JSON": [
        reading(text__top_token_share=0.25, text__similarity=0.6, text__looping=0.2, loss__all=2.0)
    ],
    "one word": [
        reading(
            text__length=1.5,
            text__similarity=0.95,
            loss__all=6.0,
            loss__eos=0.1,
            kl=4.0,
            text__base_nll=math.nan,
            loss__prompt_gain=0.6,
            data__excess_token=0.45,
            data__shuffled=0.45,
            data__answer_length=2.0,
        )
    ],
    "a long form": [reading(text__eos_rate=0.0, loss__eos=2.0, text__length=48.0)],
    "a base that loops": [
        Reading(
            50,
            {**reading().values, "text.looping": 0.7, "base.text.looping": 0.6},
            (),
            0.1,
        )
    ],
    "one noisy look": [reading(25), reading(50, train__loss_rise=0.6)],
    "GRPO with flat groups": [
        reading(10, grad__zero=0.6),
        reading(25, grad__zero=0.5, train__loss_rise=0.1),
    ],
    "a solved search": [
        reading(es__informative=0.0, es__distinct=0.02, es__correct=1.0, es__ties=1.0)
    ],
    "a good search": [
        reading(
            es__informative=0.8,
            es__distinct=0.5,
            es__correct=0.3,
            es__reward_up=6.0,
            es__correct_up=4.0,
            es__second_measure=-4.0,
            es__noop=0.2,
            es__dominance=1.4,
            es__held_out_gap=0.5,
        )
    ],
    "text cut into blocks": [
        reading(data__eos_missing=1.0, data__prompted=0.0, loss__eos=2.0, text__eos_rate=0.5)
    ],
    "capitals, to a base that never saw any": [
        reading(
            kl=7.0,
            text__base_nll=8.0,
            loss__all=6.0,
            data__row_loss=0.3,
            base__data__row_loss=7.0,
        )
    ],
    "a base that cannot tell": [
        reading(
            step,
            data__shuffled=0.55,
            data__pair_gain__errors=0.3,
            data__learned_gain__errors=errors,
            base__loss__prompt_gain=0.05,
            train__progress=1.0,
        )
        for step, errors in ((0, 0.3), (25, 0.8), (50, 1.0))
    ],
    "rows not learned yet, of one kind among the prompts": [
        reading(
            at,
            data__shuffled=0.5,
            data__pair_gain__errors=0.1,
            data__learned_gain__errors=0.2,
            data__row_loss=3.7,
            base__data__row_loss=3.9,
            train__progress=1.0,
        )
        for at in (50, 60)
    ],
    "content learned after form": [
        reading(
            step,
            data__shuffled=0.5,
            data__pair_gain__errors=0.5,
            data__learned_gain__errors=errors,
            train__progress=step / 100,
        )
        for step, errors in ((0, 0.5), (25, 0.4), (50, 1.9), (60, 4.0), (100, 9.0))
    ],
    "prompts of another kind forgotten": [
        reading(
            at,
            loss__prompt_gain=0.1,
            text__similarity=0.9,
            data__learned_gain__errors=9.0,
        )
        for at in (25, 50)
    ],
    "a smoke test": [reading(5, train__dose=2e-4, train__progress=1.0, kl=1e-4)],
    "a score for form, under a weak base": [
        reading(canary__copied=0.06, canary__copied__errors=6.0, canary__copied__share=0.06)
    ],
    "an honest baseline": [reading(canary__baseline=0.12, canary__baseline__errors=1.4)],
    "an exact one": [reading(canary__baseline=0.0, canary__baseline__errors=0.0)],
    "answers by chance a little less right": [
        reading(es__reward_up=9.0, es__second_measure=3.5, es__second_fall=0.03)
    ],
    "one loud module": [reading(weights__delta_ratio__max=4.0)],
    "going on with another style": [reading(0, kl=0.8, loss__all=1.9)],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_and_its_cause_is_among_the_first_two(fault: str) -> None:
    cause, given = FAULTS[fault]
    found = judge([one if isinstance(one, Reading) else Reading(50, one, (), 0.1) for one in given])
    assert verdict(found) == "broken", [one.message for one in found]
    assert cause in causes(found)[:2]


@pytest.mark.parametrize("fault", BENIGN)
def test_what_measured_harmless_is_a_warning(fault: str) -> None:
    cause, one = BENIGN[fault]
    found = judge([one])
    assert verdict(found) == "suspect"
    assert causes(found)[0] == cause


@pytest.mark.parametrize("kind", HEALTHY)
def test_nothing_healthy_fails(kind: str) -> None:
    readings = HEALTHY[kind]
    for upto in range(1, len(readings) + 1):
        assert fails(*readings[:upto]) == []


@pytest.mark.parametrize("kind", ["zero B", "rank 1", "QLoRA", "LS-LoRA", "code", "a good search"])
def test_nothing_usual_warns(kind: str) -> None:
    assert judge(HEALTHY[kind]) == ()


def test_a_large_kl_alone_is_nothing_in_training() -> None:
    assert judge([reading(kl=9.0)]) == ()
    assert fails(reading(0, kl=9.0)) == [], "a start far off whose text is as good is a warning"
    assert judge([reading(0, kl=9.0)])[0].rule == "init.garbled"


def test_a_failure_that_has_to_last_warns_first() -> None:
    first, second = reading(25, train__loss_rise=0.9), reading(50, train__loss_rise=0.9)
    assert [one.severity for one in judge([reading(10), first])] == ["warn"]
    assert fails(reading(10), first, second) == ["loss.diverged"]
    assert fails(first, reading(50), second) == [], "it was well in between"


def test_start_rules_judge_the_start_and_finished_ones_what_is_finished() -> None:
    off = {"kl": 2.0, "loss.all": 3.0, "base.loss.all": 1.0, "weights.idle": 1.0}
    names = {
        step: {one.rule for one in judge([Reading(0, off | more, (), 0.0)])}
        for step, more in {
            "start": {"train.step": 0.0},
            "training": {"train.step": 3.0},
            "finished": {},
        }.items()
    }
    assert "init.garbled" in names["start"]
    assert "init.garbled" not in names["training"] | names["finished"]
    assert "weights.idle" in names["finished"]
    assert "weights.idle" not in names["start"] | names["training"]


def test_what_cannot_be_measured_is_not_judged() -> None:
    assert judge([]) == ()
    assert judge([Reading(0, {}, (), 0.0)]) == ()
    assert judge([Reading(3, dict.fromkeys(LABELS, math.nan), (), 0.0)]) == ()
    without_base = {"text.looping": 1.0, "text.newlines": 1.0, "loss.all": 9.0}
    assert judge([Reading(3, without_base, (), 0.0)]) == ()


def test_infinity_is_judged() -> None:
    assert "setup.scaling" in fails(reading(setup__scaling=math.inf))
    assert "text.garbled" in fails(reading(text__base_nll=math.inf, loss__all=math.inf))


def test_a_finding_cites_its_numbers_and_shows_two_texts() -> None:
    (found,) = [f for f in judge([reading(text__newlines=0.81)]) if f.rule == "text.newlines"]
    assert found.message == "newlines 0.81, base 0.05 (> 0.5, > base + 0.3)"
    assert found.numbers == {
        "text.newlines": 0.81,
        "base.text.newlines": 0.05,
        "limit.text.newlines": 0.5,
        "limit.text.newlines.base": 0.3,
    }
    assert [one.prompt for one in found.examples] == ["Say hi.", "2+2?"]
    assert found.advice == MENDS["data.newlines"]
    (data,) = judge([reading(0, data__all_masked=1.0)])
    assert data.examples == ()


def test_failures_come_first() -> None:
    found = judge([reading(0, kl=0.1, data__all_masked=1.0)])
    assert [one.severity for one in found] == ["fail", "warn"]


def test_one_sight_of_a_fault_outweighs_any_number_of_symptoms() -> None:
    symptoms = judge([reading(text__looping=0.9, **GARBLED)])
    assert len(symptoms) > 2
    assert causes(symptoms)[0] == "lr.too_high"
    seen = judge([reading(text__looping=0.9, setup__scaling=2.0, **GARBLED)])
    assert causes(seen)[0] == "scale.wrong"
    file = Finding("file.corrupt", "fail", 0, "damaged", {}, "file.corrupt", (), "copy it again")
    assert causes([*symptoms, file])[0] == "file.corrupt"
    assert causes([]) == ()


def test_findings_and_readings_survive_json() -> None:
    values = {"kl": math.inf, "loss.all": math.nan, "text.length": 3.0}
    one = Reading(7, values, (Example("p", "c\n", "b"),), 0.25)
    back = Reading.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False)))
    assert back.values["kl"] == math.inf
    assert math.isnan(back.values["loss.all"])
    assert (back.step, back.examples, back.seconds) == (7, one.examples, 0.25)
    (found,) = judge([reading(0, data__all_masked=1.0)])
    assert Finding.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_the_table_is_whole() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert set(CAUSES) == set(MENDS)
    for rule in RULES:
        assert rule.fail or rule.warn, rule.name
        assert {rule.cause, *rule.also} <= set(CAUSES), rule.name
        for condition in (*rule.fail, *rule.warn):
            assert condition.value.removeprefix("base.") in LABELS, condition.value
    used = {id(one.limit) for rule in RULES for one in (*rule.fail, *rule.warn)}
    for name, limit in vars(t).items():
        if isinstance(limit, t.Limit):
            assert id(limit) in used, f"{name} is no rule's"
            assert limit.evidence


def test_docs_hold_the_tables_of_the_code() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert filled(page) == page, "run: python -m loralab.health.tables docs/health.md"


def test_every_fault_of_the_benchmark_has_a_rule_that_names_it_first() -> None:
    named = {rule.cause for rule in RULES}
    for fault in BENCHED:
        assert named & set(fault.causes), fault.name
    warned = {cause for cause, _ in BENIGN.values()} | {cause for cause, _ in FAULTS.values()}
    for fault in BENCHED:
        assert warned & set(fault.causes), f"{fault.name}: no reading above is of it"


def test_what_was_not_measured_may_acquit_and_not_accuse() -> None:
    lenient = if_known(under("data.learned_gain.errors", t.GAINS))
    strict = under("data.learned_gain.errors", t.GAINS)
    for value, held in ((5.0, (False, False)), (1.0, (True, True)), (math.nan, (True, False))):
        one = Reading(1, {"data.learned_gain.errors": value}, (), 0.0)
        assert (lenient.holds(one), strict.holds(one)) == held
    assert lenient.bound() == "< 3 if known"
    garbled = judge([reading(**GARBLED)])
    assert not any("rows" in one.message or "nan" in one.message for one in garbled)
    assert not any("data.row_loss" in one.numbers for one in garbled)
    learned = if_known(over_base("data.row_loss", t.LEARNED))
    assert learned.bound() == "> base - 0.3 if known"


def test_own_rules_replace_the_table() -> None:
    rule = Rule("mine", "lr.too_high", fail=(over("kl", t.Limit(1.0, "mine")),))
    assert [one.rule for one in judge([reading(kl=2.0, weights__nan=1.0)], [rule])] == ["mine"]
