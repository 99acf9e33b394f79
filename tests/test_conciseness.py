"""Conciseness: the reward is a difference of lengths, correctness is another matter."""

from __future__ import annotations

import pytest

from loralab import tasks
from loralab.tasks.base import Example
from loralab.tasks.check import check
from loralab.tasks.conciseness import mentions


def test_two_questions_train_and_eight_test_none_shared() -> None:
    task = tasks.get("conciseness")
    train, test = task.examples("train"), task.examples("test")
    assert (len(train), len(test)) == (2, 8)
    prompts = [task.prompt(example) for example in (*train, *test)]
    assert len({str(prompt) for prompt in prompts}) == 10
    assert all(p[0]["role"] == "user" and len(p) == 1 for p in prompts if not isinstance(p, str))
    assert len({example.id for example in (*train, *test)}) == 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_gold_scores_full_marks_and_non_answers_less(split: str) -> None:
    task = tasks.get("conciseness")
    assert check(task, split).passed  # type: ignore[arg-type]
    for example in task.examples(split):  # type: ignore[arg-type]
        assert task.score(example, task.gold(example) or "").reward == 0


@pytest.mark.parametrize(
    ("completion", "reward", "correct"),
    [
        ("Eight", 0, True),
        ("8 🕷", -2, True),
        ("Spiders have EIGHT legs.", -19, True),
        ("Seven", 0, False),
        ("Eighty", -1, False),
        ("weight", -1, False),
        ("", -5, False),
        ("x" * 1_000_000, -999_995, False),
    ],
)
def test_reward_is_minus_the_difference_in_characters(
    completion: str, reward: float, correct: bool
) -> None:
    example = Example("x", {"question": "?", "target": "Eight", "aliases": ("8",)})
    result = tasks.get("conciseness").score(example, completion)
    assert (result.reward, result.correct) == (reward, correct)
    assert sum(result.parts.values()) == result.reward


def test_what_cannot_be_scored_is_worse_than_any_answer_of_a_demo() -> None:
    assert tasks.get("conciseness").reward_floor < -48 * 10


def test_mentions_takes_phrases_as_they_stand() -> None:
    assert mentions("It is C++.", ("c++",))
    assert mentions("the moon's pull", ("The Moon",))
    assert not mentions("cxx", ("c..",))
