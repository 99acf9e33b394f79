"""A process that scores: `python -m loralab.scoring.worker`, started by `pool.Scorer`.

One JSON object a line. On stdin first {"path": sys.path, "name": task, "options": {...},
"deadline": seconds}, then chunks {"items": [[split, example id, text], ...]}. On stdout first
{"ready": true} or {"error": text}, then a line an item, in order: {"reward", "correct", "parts"}
or {"failed": why}. What a reward prints goes to stderr.

It never outlives its parent by much, also where a reward hangs inside C code and no Python runs:
the kernel's own alarm ends it a few seconds after the deadline.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, TextIO

from loralab import tasks
from loralab.errors import UserError
from loralab.scoring.one import scored
from loralab.tasks.base import Score, Split, Task

GRACE = 5.0
"""Seconds after the deadline at which the alarm rings, if the parent has not ended us before."""


def main() -> None:
    """Serve until stdin closes."""
    # Ctrl-C, and a scheduler's SIGTERM to a whole job, are for the driver: it finishes its
    # generation and needs the scores. It ends us by SIGKILL.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    try:
        serve(answers)
    except BrokenPipeError:
        os._exit(0)  # the driver is gone


def serve(answers: TextIO) -> None:
    """Make the task, then score chunk by chunk."""
    hello: dict[str, Any] = json.loads(sys.stdin.readline())
    sys.path[:] = hello["path"]
    try:
        scorer = _Examples(tasks.get(hello["name"], **hello["options"]))
    except UserError as error:
        _say(answers, {"error": str(error)})
        return
    except Exception as error:
        _say(answers, {"error": f"task {hello['name']!r}: {type(error).__name__}: {error}"})
        return
    _say(answers, {"ready": True})
    limit = float(hello["deadline"]) + GRACE
    for line in sys.stdin:
        for split, identity, text in json.loads(line)["items"]:
            signal.setitimer(signal.ITIMER_REAL, limit)
            _say(answers, scorer.answer(split, identity, text))
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Examples:
    """A task with its examples by name, read before the first deadline runs."""

    def __init__(self, task: Task) -> None:
        self._task = task
        splits: tuple[Split, ...] = ("train", "test")
        self._known = {split: {one.id: one for one in task.examples(split)} for split in splits}

    def answer(self, split: Split, identity: str, text: str) -> dict[str, Any]:
        """The line that answers an item."""
        example = self._known[split].get(identity)
        if example is None:
            return {"failed": f"task {self._task.name}: no example {identity!r} in {split}"}
        score = scored(self._task, example, text)
        if isinstance(score, Score):
            try:
                parts = {str(name): _plain(value) for name, value in score.parts.items()}
                return {"reward": score.reward, "correct": score.correct, "parts": parts}
            except (TypeError, ValueError) as error:
                score = f"task {self._task.name}: parts: {error}"
        return {"failed": score}


def _plain(value: Any) -> float:
    return value if type(value) in (int, float) else float(value)


def _say(answers: TextIO, row: dict[str, Any]) -> None:
    answers.write(json.dumps(row) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
