"""What a task makes of completions, those that failed among them."""

from __future__ import annotations

from typing import Any

import pytest

from loralab.engines.base import Completion
from loralab.rollouts import completion_row, judge, share_correct
from loralab.tasks.base import Example, Prompt, Score, Split


class Words:
    """Scores the number of words; `judged` says whether an answer can be right."""

    name = "words"
    reward_floor = -1.0
    full_marks = 1.0

    def __init__(self, judged: bool, broken: bool = False) -> None:
        self.judged, self.broken = judged, broken

    def examples(self, split: Split) -> list[Example]:
        return [Example("0", {})]

    def prompt(self, example: Example) -> Prompt:
        return "say"

    def gold(self, example: Example) -> str | None:
        return None

    def score(self, example: Example, completion: str) -> Score:
        if completion == "raise" or self.broken:
            raise ValueError("no")
        if completion == "none":
            return None  # type: ignore[return-value]
        reward = float("nan") if completion == "nan" else float(len(completion.split()))
        return Score(reward, bool(completion) if self.judged else None, {"words": reward})


def done(text: str, error: str | None = None) -> Completion:
    reason: Any = "error" if error else "stop"
    return Completion(text=text, tokens=(1,), finish_reason=reason, error=error)


FAILED = [done("", "no room"), done("raise"), done("nan"), done("none")]


@pytest.mark.parametrize("failed", FAILED)
def test_a_failure_is_an_empty_answer_at_the_floor(failed: Completion) -> None:
    for judged, right, share in ((True, False, 0.5), (False, None, None)):
        task = Words(judged)
        rollouts = [judge(task, Example("0", {}), one) for one in (failed, done("a b"))]
        row = completion_row(rollouts[0])
        assert row["failed"]
        assert (row["reward"], row["correct"], row["parts"]) == (-1.0, right, {"words": 0.0})
        assert share_correct(rollouts) == share
        assert completion_row(rollouts[1])["failed"] is None


def test_a_task_that_can_score_nothing_fails_everywhere() -> None:
    rollout = judge(Words(False, broken=True), Example("0", {}), done("a"))
    assert rollout.failed == "task words: ValueError: no"
    assert rollout.score == Score(-1.0, False)
