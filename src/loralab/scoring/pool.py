"""Scoring in worker processes, each completion with a deadline.

A reward that hangs, is killed or takes its process with it costs its own completion alone: the
worker is ended and replaced, the others go on. A worker holds the task, made from the config's
name and options as the driver's was, and is sent (split, example id, text); no tensors, no pickle.

Scores are those of the in-process path to the bit. What a deadline decides depends on the clock: a
reward near its deadline may come in time in one run and not in the next.
"""

from __future__ import annotations

import json
import selectors
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from time import monotonic
from types import TracebackType
from typing import Any

from loralab.errors import UserError
from loralab.scoring.process import Process
from loralab.tasks.base import Example, Score, Split

Item = tuple[Split, str, str]
"""Split, the example's id in it, the completion's text."""

LONGEST_START = 300.0
"""Seconds in which a worker has to have made its task: datasets are read then."""
_CHUNK = 32
_TRIES = 2
"""A worker that died under an item may have been killed from outside; one that dies again was
killed by the item."""
_STARTS = 3
"""Workers in a row that may be ended by a signal before they are ready."""


class Scorer:
    """Scores completions of one task, `workers` at a time, `deadline` seconds each.

    Workers start with the first score and end with `close`, or when this process does. Not for use
    from several threads at once.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], deadline: float, workers: int = 2
    ) -> None:
        if not deadline > 0:
            raise ValueError(f"deadline is {deadline}: must be more than 0 seconds")
        if workers < 1:
            raise ValueError(f"workers is {workers}: must be at least 1")
        self.name, self.deadline, self.workers = name, deadline, workers
        self._hello = {"name": name, "options": dict(options), "deadline": deadline}
        self._processes: list[Process] = []
        self._empty: dict[tuple[Split, str], Score | str] = {}
        self._killed = 0

    def score(self, items: Sequence[Item]) -> list[Score | str]:
        """Of each item its score, or in one line why it has none.

        Raises:
            UserError: a worker cannot make the task.
        """
        results: list[Score | str | None] = [None] * len(items)
        tries = [0] * len(items)
        waiting = deque(range(len(items)))
        chunk = max(1, min(_CHUNK, len(items) // (4 * self.workers)))
        try:
            while any(result is None for result in results):
                self._staff(len(waiting))
                for process in self._processes:
                    if waiting and process.ready and not process.places:
                        places = [waiting.popleft() for _ in islice(range(len(waiting)), chunk)]
                        process.send(places, [items[place] for place in places])
                for process in self._answered():
                    waiting.extendleft(reversed(self._settle(process, results, tries)))
        except BaseException:
            self.close()  # what is in flight would answer the next question
            raise
        return [result for result in results if result is not None]

    def one(self, split: Split, example: Example, text: str) -> Score:
        """The score of one text.

        Raises:
            RuntimeError: it has none; says why.
        """
        [score] = self.score([(split, example.id, text)])
        if isinstance(score, str):
            raise RuntimeError(score)
        return score

    def empty(self, split: Split, example: Example) -> Score | str:
        """What an empty answer scores, asked once."""
        key = (split, example.id)
        if key not in self._empty:
            [self._empty[key]] = self.score([(*key, "")])
        return self._empty[key]

    def close(self) -> None:
        """End the workers; the next score starts new ones."""
        for process in self._processes:
            process.end()
        self._processes = []

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _staff(self, waiting: int) -> None:
        """Start workers, no more than there are items for."""
        idle = sum(not process.places for process in self._processes)
        wanted = min(self.workers - len(self._processes), waiting - idle)
        self._processes += [Process(self._hello) for _ in range(wanted)]

    def _answered(self) -> list[Process]:
        """Processes that said something, ended, or are past their time; waits for the first."""
        with selectors.DefaultSelector() as selector:
            until = monotonic() + LONGEST_START
            for process in self._processes:
                if process.places or not process.ready:
                    selector.register(process.answers, selectors.EVENT_READ, process)
                    until = min(until, process.since + self._limit(process))
            for key, _ in selector.select(max(0.0, until - monotonic())):
                key.data.read()
        # Only now is the clock asked: what was answered while we slept was answered in time.
        return [
            process
            for process in self._processes
            if process.lines or process.ended or self._late(process)
        ]

    def _limit(self, process: Process) -> float:
        return self.deadline if process.ready else LONGEST_START

    def _late(self, process: Process) -> bool:
        busy = bool(process.places) or not process.ready
        return busy and monotonic() - process.since > self._limit(process)

    def _settle(
        self, process: Process, results: list[Score | str | None], tries: list[int]
    ) -> list[int]:
        """Take a process's answers and end it if it is late or gone; the places to ask again."""
        for line in process.taken():
            row = json.loads(line)
            if not process.ready:
                self._started(row)
                process.ready = True
            else:
                results[process.places.popleft()] = _score(row)
        late = self._late(process)
        if not (late or process.ended):
            return []
        self._processes.remove(process)
        how = process.end()
        if not process.ready:
            self._killed += 1
            # As one that is killed at work: the next may be luckier.
            if process.ended and how.startswith("signal") and self._killed < _STARTS:
                return []
            took = f"took longer than {LONGEST_START:g} s" if late else f"ended by {how}"
            raise UserError(f"task {self.name}: the process that was to score it {took} at start")
        if not process.places:
            return []
        place = process.places[0]
        tries[place] += 1
        if late:
            results[place] = f"task {self.name}: took longer than {self.deadline:g} s"
        elif tries[place] == _TRIES:
            results[place] = f"task {self.name}: its process ended by {how}"
        return [one for one in process.places if results[one] is None]

    def _started(self, row: Mapping[str, Any]) -> None:
        if "error" in row:
            raise UserError(f"in the process that scores: {row['error']}")
        self._killed = 0


def _score(row: Mapping[str, Any]) -> Score | str:
    if "failed" in row:
        return str(row["failed"])
    return Score(row["reward"], row["correct"], row["parts"])
