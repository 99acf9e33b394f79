"""Rules: nothing that healthy models do fails."""

from __future__ import annotations

import math

import pytest

from loralab.health.reading import Reading
from loralab.health.rules import judge
from rule_readings import SHUFFLED, fails, reading

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
    "a search that found what it could": [
        reading(
            es__informative=0.3,
            es__distinct=0.04,
            es__correct=0.7,
            es__ties=0.8,
            es__reward_up=8.0,
        )
    ],
    "a search among answers that are sure": [
        reading(
            es__informative=0.7,
            es__distinct=0.05,
            es__correct=0.6,
            es__ties=0.8,
            es__member_kl=0.05,
        )
    ],
    "noise that moves": [reading(0, es__member_kl=0.02)],
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


@pytest.mark.parametrize("kind", HEALTHY)
def test_nothing_healthy_fails(kind: str) -> None:
    readings = HEALTHY[kind]
    for upto in range(1, len(readings) + 1):
        assert fails(*readings[:upto]) == []


@pytest.mark.parametrize(
    "kind", ["zero B", "rank 1", "QLoRA", "LS-LoRA", "code", "a good search", "noise that moves"]
)
def test_nothing_usual_warns(kind: str) -> None:
    assert judge(HEALTHY[kind]) == ()


def test_a_large_kl_alone_is_nothing_in_training() -> None:
    assert judge([reading(kl=9.0)]) == ()
    assert fails(reading(0, kl=9.0)) == [], "a start far off whose text is as good is a warning"
    assert judge([reading(0, kl=9.0)])[0].rule == "init.garbled"


def test_rows_of_line_breaks_are_not_called_shuffled() -> None:
    """And the same rows are, where they are words."""
    for share, shuffled in ((0.6, False), (0.1, True)):
        values = SHUFFLED | {"data.newline_share": share, "train.progress": 1.0}
        found = {one.rule for one in judge([Reading(at, values, (), 0.1) for at in (25, 50)])}
        assert ("data.newlines" in found) != shuffled
        assert ("data.shuffled_learned" in found) == shuffled
