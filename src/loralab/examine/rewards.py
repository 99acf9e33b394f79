"""A reward before it is followed: does it know a right answer, and a text without merit."""

from __future__ import annotations

from loralab.health.causes import MENDS
from loralab.health.findings import Finding
from loralab.tasks.base import Split, Task
from loralab.tasks.check import Failure, check

_EXAMPLES = 16


def reward_findings(task: Task) -> tuple[list[Finding], list[str]]:
    """Findings and notes of the task's grader on its first 16 examples, as `loralab tasks check`
    tells them; a gold answer that is marked down is noted, since no model is asked for it."""
    split: Split = "train" if task.examples("train") else "test"
    result = check(task, split, _EXAMPLES)
    earned = [one for one in result.failures if one.what != "gold"]
    marked_down = [one for one in result.failures if one.what == "gold"]
    notes = [f"task {task.name}: {_told(marked_down, result.examples)}"] if marked_down else []
    if not earned:
        return [], notes
    finding = Finding(
        "task.check",
        "fail",
        0,
        f"task {task.name}: {_told(earned, result.examples)}",
        {"task.failures": float(len(earned)), "task.examples": float(result.examples)},
        "reward.exploitable",
        ("evaluation.first_match",),
        MENDS["reward.exploitable"],
    )
    return [finding], notes


def _told(failures: list[Failure], examples: int) -> str:
    first = failures[0]
    of = len({one.example for one in failures})
    return f"{of} of {examples} examples fail, first {first.example}: {first.what} {first.reason}"
