"""What a task makes of one completion, whatever its code does: a score, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

from loralab.tasks.base import Example, Score, Task

LARGEST_REWARD = 1e15
"""A reward beyond this is a fault of the task, not a judgement: squares of rewards, and sums of
them over a population, have to stay finite in float32, in which updates are made."""


def scored(task: Task, example: Example, text: str) -> Score | str:
    """The score of a text as plain numbers, or why there is none, in one line.

    A task is other people's code and a run is long: what it raises, `SystemExit` among it, and
    what is no finite number of a sane size, is said and not passed on.
    """
    try:
        return _checked(task.score(example, text), task.name)
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        return f"task {task.name}: {type(error).__name__}: {said}"


def _checked(score: Score, name: str) -> Score | str:
    reward: Any = score.reward
    if not isfinite(reward):
        return f"task {name}: reward is {reward}"
    if abs(reward) > LARGEST_REWARD:
        return f"task {name}: reward is {float(reward):.3g}; beyond {LARGEST_REWARD:g} it is none"
    if not isinstance(score.parts, Mapping):
        return f"task {name}: parts are a {type(score.parts).__name__}; expected a mapping"
    number = reward if type(reward) in (int, float) else float(reward)
    correct = None if score.correct is None else bool(score.correct)
    return replace(score, reward=number, correct=correct, parts=dict(score.parts))
