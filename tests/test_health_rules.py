"""Rules: each fault's first sign fails, and its cause is named."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loralab.bench.faults.faults import FAULTS as BENCHED
from loralab.health.findings import verdict
from loralab.health.reading import Reading
from loralab.health.rules import RULES, causes, judge
from rule_readings import GARBLED, OVERSIZED, SHUFFLED, reading

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
    "both factors random, finished": (
        "scale.wrong",
        [OVERSIZED | {"text.looping": 0.9, "text.top_token_share": 0.7, "base.text.looping": 0.1}],
    ),
    "lr x 100, and every text empty": (
        "lr.too_high",
        [reading(text__empty=0.9, data__empty=0.0)],
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
        [
            reading(
                text__newlines=0.9,
                text__long_run=0.8,
                text__looping=0.7,
                data__newline_share=math.nan,
            )
        ],
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
        [reading(loss__eos=7.0, text__eos_rate=0.1, data__eos_missing=math.nan)],
    ),
    "all labels -100": (
        "data.all_masked",
        [reading(data__all_masked=1.0, train__nonfinite=3.0)],
    ),
    "responses shuffled": (
        "data.shuffled",
        [reading(at, loss__prompt_gain=0.1, data__shuffled=math.nan) for at in (25, 50)],
    ),
    "responses shuffled, seen in the data": (
        "data.shuffled",
        [SHUFFLED | {"train.progress": 0.8}, SHUFFLED | {"train.progress": 1.0}],
    ),
    "over-weighted, seen in what a finished adapter expects": (
        "data.overweighted_token",
        [Reading(0, {"data.overexpected": 0.5, "base.data.overexpected": 0.1}, (), 0.1)],
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
    "noise too weak, though pairs differ by one text of many": (
        "es.noise_too_weak",
        [reading(es__informative=0.6, es__distinct=0.05, es__correct=0.0, es__ties=0.93)],
    ),
    "noise too weak, before the first generation": (
        "es.noise_too_weak",
        [reading(0, es__member_kl=2e-4)],
    ),
    "noise lost to rounding": ("es.noise_too_weak", [reading(es__noop=0.97)]),
    "an outlier sets sigma": ("es.outlier_sigma", [reading(es__dominance=12.0)]),
}

BENIGN: dict[str, tuple[str, Reading]] = {
    "shuffled, says a base before the training": (
        "data.shuffled",
        reading(0, **{k: v for k, v in SHUFFLED.items() if k.startswith("data.")}),
    ),
    "rows that fit any prompt, of a finished adapter": (
        "data.shuffled",
        Reading(0, {k: v for k, v in SHUFFLED.items() if not k.startswith("train.")}, (), 0.1),
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


def test_every_fault_of_the_benchmark_has_a_rule_that_names_it_first() -> None:
    named = {rule.cause for rule in RULES}
    for fault in BENCHED:
        assert named & set(fault.causes), fault.name
    warned = {cause for cause, _ in BENIGN.values()} | {cause for cause, _ in FAULTS.values()}
    for fault in BENCHED:
        assert warned & set(fault.causes), f"{fault.name}: no reading above is of it"
