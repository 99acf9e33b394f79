"""Judging: when a rule speaks, what it says, and which cause comes first."""

from __future__ import annotations

import json
import math
from pathlib import Path

from loralab.health import thresholds as t
from loralab.health.causes import CAUSES, MENDS
from loralab.health.condition import LABELS, if_known, over, over_base, under
from loralab.health.findings import Example, Finding
from loralab.health.reading import Reading
from loralab.health.rule import Rule
from loralab.health.ruled_out import SIGNS
from loralab.health.rules import RULES, causes, judge
from loralab.health.tables import filled
from rule_readings import GARBLED, OVERSIZED, fails, reading

DOCS = Path(__file__).parent.parent / "docs" / "health.md"


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


def test_the_reach_of_the_noise_is_judged_once() -> None:
    """A fact of the start, told again at each look."""
    assert "es.weak_noise" in fails(reading(0, es__member_kl=1e-4))
    assert fails(reading(5, es__member_kl=1e-4)) == []


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


def causes_of(rule: str, one: Reading) -> tuple[str, ...]:
    (found,) = [found for found in judge([one]) if found.rule == rule]
    assert found.advice == MENDS[found.cause]
    return (found.cause, *found.also)


def test_a_cause_that_a_reading_rules_out_is_not_named() -> None:
    unknown = causes_of("text.empty", reading(text__empty=0.9))
    assert unknown[:2] == ("data.empty", "lr.too_high")
    assert causes_of("text.empty", reading(text__empty=0.9, data__empty=0.4)) == unknown
    assert causes_of("text.empty", reading(text__empty=0.9, data__empty=0.0)) == unknown[1:]
    endless = {"loss__eos": 7.0, "text__eos_rate": 0.1}
    assert causes_of("text.endless", reading(**endless))[0] == "template.wrong"
    of_rows = reading(data__eos_missing=0.3, **endless)
    assert causes_of("text.endless", of_rows)[0] == "data.eos_masked"
    idle = {"weights.idle": 1.0, "train.dose": 1e-2}
    assert "lr.too_low" not in causes_of("weights.idle", Reading(9, idle, (), 0.0))
    assert "lr.too_low" in causes_of("weights.idle", Reading(9, {"weights.idle": 1.0}, (), 0.0))


def test_a_cause_stands_until_all_that_would_show_it_was_looked_for() -> None:
    of_text = {"text__newlines": 0.9}
    assert causes_of("text.newlines", reading(**of_text))[0] == "data.newlines"
    blank = reading(**of_text, data__blank=0.5)
    assert causes_of("text.newlines", blank)[0] == "data.newlines"
    neither = reading(**of_text, data__blank=0.0)
    assert causes_of("text.newlines", neither) == ("data.overweighted_token", "lr.too_high")
    # Where nothing is left something has to be named.
    only = Rule("mine", "data.empty", ("data.newlines",), fail=(over("kl", t.Limit(1.0, "mine")),))
    (found,) = judge([reading(kl=2.0, data__empty=0.0, data__blank=0.0)], [only])
    assert (found.cause, found.also) == ("data.empty", ("data.newlines",))


def test_a_finished_adapter_out_of_proportion_has_a_wrong_scale_or_start_first() -> None:
    texts = {"text.looping": 0.9, "base.text.looping": 0.1}
    texts |= {"text.top_token_share": 0.7, "base.text.top_token_share": 0.1}
    texts |= {"text.long_run": 0.8, "base.text.long_run": 0.0}
    for values in (OVERSIZED, OVERSIZED | texts):
        found = judge([Reading(0, values, (), 0.0)])
        ranked = causes(found)
        assert ranked[:3] == ("scale.wrong", "lr.too_high", "init.garbled")
    # Where its start was looked at that is known, and so is a training that went too far.
    start, large = reading(0, kl=4.0, loss__all=6.0), Reading(0, OVERSIZED | texts, (), 0.0)
    assert "init.garbled" in causes([*judge([start]), *judge([large])])[:2]
    # Of a training it is the learning rate.
    assert causes(judge([Reading(50, OVERSIZED | {"train.step": 50.0}, (), 0.0)]))[0] == (
        "lr.too_high"
    )
    mild = OVERSIZED | {"weights.delta_ratio.max": 0.8, "loss.all": 1.5, "text.base_nll": 1.0}
    (found_mild,) = judge([Reading(0, mild, (), 0.0)])
    assert (found_mild.severity, found_mild.cause) == ("warn", "lr.too_high")


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
    judged = [one for rule in RULES for one in (*rule.fail, *rule.warn)]
    signs = [one for found in SIGNS.values() for one in found]
    assert set(SIGNS) <= set(CAUSES)
    assert {one.value for one in signs} <= set(LABELS)
    used = {id(one.limit) for one in (*judged, *signs)}
    for name, limit in vars(t).items():
        if isinstance(limit, t.Limit):
            assert id(limit) in used, f"{name} is no rule's"
            assert limit.evidence


def test_docs_hold_the_tables_of_the_code() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert filled(page) == page, "run: python -m loralab.health.tables docs/health.md"


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
