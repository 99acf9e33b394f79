"""Evaluations that reward nothing, and sound ones that must pass."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import inf, isnan
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from loralab import tasks
from loralab.health.canaries import (
    CanaryProbe,
    base_answers,
    compared,
    distinct_prompts,
    gold_right,
    last_answer,
    sampling_error,
    shares,
)
from loralab.health.look import Subject
from loralab.health.reading import Reading
from loralab.health.rules import judge
from loralab.tasks.base import Example, Score

WORDS = ("red", "green", "blue")


class Colours:
    """Names the colour of a thing; the last "is" with a colour answers, a bare list does not."""

    name = "colours"
    reward_floor = 0.0

    def examples(self, split: str) -> Sequence[Example]:
        return [
            Example(str(n), {"thing": tiny.words(2, n), "colour": WORDS[n % 3]}) for n in range(9)
        ]

    def prompt(self, example: Example) -> str:
        return f"{example.data['thing']} ab cd"

    def score(self, example: Example, completion: str) -> Score:
        said = [word.strip(".") for word in completion.split()]
        named = [b for a, b in itertools.pairwise(said) if a == "is" and b in WORDS]
        right = named[-1:] == [example.data["colour"]]
        return Score(float(right), right)

    def gold(self, example: Example) -> str:
        return f"It is {example.data['colour']}."

    def answer_options(self, example: Example) -> Sequence[str]:
        return WORDS

    def metrics(self, answered: Sequence[tuple[Example, str]]) -> Mapping[str, float]:
        return {"letters": sum(len(text) for _, text in answered) / len(answered)}


def subject(dtype: torch.dtype = torch.float32) -> Subject:
    model = get_peft_model(
        tiny.model("llama", dtype),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return Subject(model, tiny.tokenizer(), prompts=["ab cd"], max_new_tokens=8)


def measured(score: Any = None, **more: Any) -> dict[str, float]:
    probe = CanaryProbe(Colours(), score=score, max_new_tokens=8, **more)  # type: ignore[arg-type]
    return probe.measure(subject().look())


def found(values: dict[str, float]) -> list[str]:
    return [one.rule for one in judge([Reading(0, values, (), 0.0)]) if one.severity == "fail"]


def test_a_sound_evaluation_passes() -> None:
    got = measured(baseline=0.0)
    for name in ("empty", "newlines", "copied", "options", "identity", "baseline", "last_answer"):
        assert got[f"canary.{name}"] == 0, name
    assert got["canary.gold"] == got["canary.gold_right"] == 1
    assert got["canary.prompts_distinct"] == 1
    for name in ("empty", "newlines", "copied", "options"):
        assert got[f"canary.{name}.share"] == got[f"canary.{name}.errors"] == 0, name
    assert found(got) == []


def test_shipped_tasks_pass() -> None:
    task = tasks.get("countdown")
    got = CanaryProbe(task, limit=8, max_new_tokens=8).measure(subject().look())
    for name in ("empty", "newlines", "copied"):
        # The copied prompt earns Countdown's 0.06 for form, which this base does not.
        assert got[f"canary.{name}.share"] <= 0.1, name
    assert got["canary.last_answer"] == 0 or isnan(got["canary.last_answer"])
    assert got["canary.gold"] > 0
    assert found(got) == []


def test_a_score_of_prompt_and_completion_rewards_a_copy() -> None:
    def score(example: Example, completion: str) -> Score:
        return Score(float(example.data["thing"] in completion))

    assert measured(score)["canary.copied"] == 1
    assert measured(score)["canary.empty"] == 0

    class Quoting(Colours):
        def gold(self, example: Example) -> str:
            return f"{example.data['thing']} is {example.data['colour']}."

    probe = CanaryProbe(Quoting(), score=score, max_new_tokens=8)  # type: ignore[arg-type]
    got = probe.measure(subject().look())
    assert (got["canary.copied.share"], got["canary.empty.share"]) == (1, 0)
    assert found(got) == ["canary.copied", "canary.copied_over_base"]


def test_a_reward_for_shortness_is_exploitable() -> None:
    got = measured(lambda example, completion: Score(-float(len(completion.strip()))))
    assert got["canary.empty"] > 0
    assert got["canary.newlines"] > 0
    assert got["canary.gold"] < got["canary.empty"]
    assert got["canary.empty.share"] > 1
    assert "canary.empty" in found(got)


def test_what_a_text_earns_is_set_against_gold_and_not_against_a_weak_base() -> None:
    form = compared({"gold": [1.0] * 9, "copied": [0.06] * 9, "empty": [0.0] * 9}, [0.0] * 9)
    assert form["copied"] == form["copied.share"] == pytest.approx(0.06)
    assert form["copied.errors"] > 3, "certain, and little"
    strong = compared({"gold": [1.0] * 9, "copied": [0.4] * 9, "empty": [0.0] * 9}, [0.2] * 9)
    assert strong["copied.share"] == pytest.approx(0.4)
    assert strong["copied.errors"] > 3
    scattered = compared(
        {"gold": [1.0] * 4, "copied": [1.0, 0.0, 0.0, 0.0], "empty": [0.0] * 4}, [0.0, 0, 0, 1.0]
    )
    assert scattered["copied.errors"] == 0
    assert shares({"gold": [0.0], "empty": [2.0], "copied": [1.0]})["empty.share"] == inf
    assert isnan(shares({"gold": [1.0], "empty": [1.0], "copied": [1.0]})["empty.share"])
    assert shares({"empty": [2.0]}) == {}


def test_a_match_anywhere_rewards_a_list_of_all_options() -> None:
    def score(example: Example, completion: str) -> Score:
        right = example.data["colour"] in completion
        return Score(float(right), right)

    got = measured(score)
    assert got["canary.options"] == 1
    assert got["canary.last_answer"] == 0


def test_a_first_match_misses_the_right_answer_behind_a_wrong_one() -> None:
    def score(example: Example, completion: str) -> Score:
        found = [word.strip(".") for word in completion.split() if word.strip(".") in WORDS]
        right = found[:1] == [example.data["colour"]]
        return Score(float(right), right)

    assert measured(score)["canary.last_answer"] == -1


def test_a_first_match_misses_gold_answers_that_show_their_working() -> None:
    class Sums(Colours):
        def gold(self, example: Example) -> str:
            return f"{int(example.id) + 1} + 30 = {int(example.id) + 31}\n{int(example.id) + 31}"

        def first(self, example: Example, completion: str) -> Score:
            numbers = [word for word in completion.split() if word.isdigit()]
            right = numbers[:1] == [str(int(example.id) + 31)]
            return Score(float(right), right)

        def last(self, example: Example, completion: str) -> Score:
            numbers = [word for word in completion.split() if word.isdigit()]
            right = numbers[-1:] == [str(int(example.id) + 31)]
            return Score(float(right), right)

    task = Sums()
    examples = task.examples("test")
    assert last_answer(task, examples, task.first) == -1  # type: ignore[arg-type]
    assert gold_right(task, examples, task.first) == 0  # type: ignore[arg-type]
    assert last_answer(task, examples, task.last) == 0  # type: ignore[arg-type]
    assert gold_right(task, examples, task.last) == 1  # type: ignore[arg-type]


def test_an_answer_that_must_stand_alone_is_no_first_match() -> None:
    task = Colours()

    def score(example: Example, completion: str) -> Score:
        right = completion == task.gold(example)
        return Score(float(right), right)

    assert isnan(last_answer(task, task.examples("test"), score))  # type: ignore[arg-type]


def test_one_question_over_and_over_shows() -> None:
    examples = Colours().examples("test")
    assert distinct_prompts(examples, lambda example: "the same context") == pytest.approx(1 / 9)
    assert measured(prompt=lambda example: "ab cd")["canary.prompts_distinct"] < 0.2


def test_a_baseline_from_elsewhere_shows() -> None:
    off = measured(baseline=0.4)
    assert off["canary.baseline"] == pytest.approx(0.4)
    assert found(off) == ["canary.baseline"]
    assert "canary.baseline" not in measured()


def test_an_honest_baseline_of_more_examples_passes() -> None:
    assert found(measured(baseline=0.15, baseline_examples=90)) == []
    assert found(measured(baseline=0.4, baseline_examples=90)) == ["canary.baseline"]
    half = [1.0, 0.0] * 8
    # Of the 16 measured nothing is left to chance but an answer; of 64 the other 48 are.
    assert sampling_error(half, None, [0.0, 1.0]) == sampling_error(half, 16, []) == 1 / 16
    assert sampling_error(half, 64, []) == pytest.approx(0.51 / 4 * 0.75**0.5, rel=0.02)
    assert sampling_error([0.0] * 16, 64, [1.0]) > 0.04, "a base without a point may have some"


def test_a_metric_that_changes_by_itself_shows() -> None:
    class Drifting(Colours):
        calls = 0

        def metrics(self, answered: Sequence[tuple[Example, str]]) -> Mapping[str, float]:
            self.calls += 1
            return {"letters": float(self.calls)}

    got = CanaryProbe(Drifting(), max_new_tokens=4).measure(subject().look())  # type: ignore[arg-type]
    assert got["canary.identity"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_zeros_answers_as_the_base(dtype: torch.dtype) -> None:
    requests = [tiny.words(4, n) for n in range(6)]
    seen = subject(dtype)
    plain, same = base_answers(seen, requests, 12)
    assert plain == same
    with seen.as_model() as causal:
        from loralab.health import greedy

        adapted = [one.text for one in greedy.complete(causal, seen.tokenizer, requests, 12)]
    assert plain != adapted


def test_scores_that_raise_count_as_the_floor() -> None:
    def score(example: Example, completion: str) -> Score:
        if not completion:
            raise ValueError("nothing to score")
        return Score(float("nan"))

    got = measured(score)
    assert got["canary.empty"] == got["canary.copied"] == 0


def test_measured_once_for_a_subject() -> None:
    seen, probe = subject(), CanaryProbe(Colours(), max_new_tokens=4)  # type: ignore[arg-type]
    first = probe.measure(seen.look())
    probe._examples = probe._examples[:1]
    assert probe.measure(seen.look()) == first


def test_without_a_base_nothing_is_compared() -> None:
    seen = Subject(tiny.model("llama"), tiny.tokenizer(), prompts=["ab"])
    got = CanaryProbe(Colours()).measure(seen.look())  # type: ignore[arg-type]
    assert isnan(got["canary.empty"])
    assert got["canary.prompts_distinct"] == 1
