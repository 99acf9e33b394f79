"""The check finds the graders that are wrong, each in its own way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from loralab.tasks.base import Example, Prompt, Score, Split
from loralab.tasks.check import CheckResult, check

Grade = Callable[[str], Score]


class Echo:
    """Answer with the word of the example; graded by a given function."""

    name = "echo"
    reward_floor = 0.0
    full_marks = 1.0

    def __init__(self, grade: Grade, gold: str | None = "word") -> None:
        self.grade = grade
        self.answer = gold

    def examples(self, split: Split) -> Sequence[Example]:
        return [Example(str(i), {}) for i in range(3 if split == "train" else 1)]

    def prompt(self, example: Example) -> Prompt:
        return "Say word, then stop."

    def score(self, example: Example, completion: str) -> Score:
        return self.grade(completion)

    def gold(self, example: Example) -> str | None:
        return self.answer


def right(text: str) -> Score:
    return Score(float(text == "word"), text == "word")


def whats(result: CheckResult) -> set[str]:
    return {failure.what for failure in result.failures}


def test_a_sound_grader_passes_and_limit_limits() -> None:
    assert check(Echo(right), "train") == CheckResult("echo", "train", 3, (), ())
    assert check(Echo(right), "train", limit=2).examples == 2
    assert check(Echo(right), "test").passed


@pytest.mark.parametrize(
    ("grade", "expected"),
    [
        (
            lambda t: Score(0.0, t == "word"),
            {"gold", "empty", "newline", "newlines", "copied prompt"},
        ),
        (lambda t: Score(float(t == "word"), False), {"gold"}),
        (lambda t: Score(0.9 * (t == "word"), t == "word"), {"gold"}),
        (lambda t: Score(float("nan") if t == "word" else 0.0), None),
        (lambda t: Score(float("word" in t), "word" in t), {"copied prompt"}),
        (lambda t: Score(float(t in ("word", "")), t == "word"), {"empty"}),
        (
            lambda t: Score(float(t == "word"), not t.strip() or t == "word"),
            {"empty", "newline", "newlines"},
        ),
        (lambda t: Score(1.0 - abs(len(t) - 4)), None),
        (lambda t: Score(1.0 if t == "word" or len(t) > 200 else 0.0), {"newlines"}),
    ],
)
def test_a_wrong_grader_is_found(grade: Grade, expected: set[str] | None) -> None:
    result = check(Echo(grade), "test")
    if expected is None:
        assert result.passed is (grade("word").reward == 1.0)
    else:
        assert whats(result) == expected
        assert not result.passed


def test_without_gold_nothing_is_proved() -> None:
    result = check(Echo(right, gold=None), "train")
    assert result.without_gold == ("0", "1", "2")
    assert not result.failures
    assert not result.passed
    assert whats(check(Echo(lambda t: Score(1.0, True), gold=None), "test")) >= {"empty"}
