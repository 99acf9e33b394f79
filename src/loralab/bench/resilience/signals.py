"""Signals, a second process, and a clock that jumps."""

from __future__ import annotations

import datetime
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from typing import Self

from loralab import durable
from loralab.bench.resilience.child import Child
from loralab.bench.resilience.rows import Row, Trial, ending, shown
from loralab.bench.resilience.world import Scene
from loralab.errors import UserError

_YEAR = 365.25 * 24 * 3600
_ATTEMPTS = 6
"""Signals that may have fallen between two generations, or come after the end: one that always
seems to is lost."""


def terminated(scene: Scene, trials: int, random: Random, say: Callable[[str], None]) -> Row:
    """SIGTERM in a generation: that one is finished, the process ends with exit code 0."""
    found, waits, generations = [], [], []
    for number in range(trials):
        for _ in range(_ATTEMPTS):
            path = scene.new()
            child = _in_a_generation(scene, path, random)
            before = _lines(path)
            began = time.monotonic()
            child.signal(signal.SIGTERM)
            code = child.ended()
            took = time.monotonic() - began
            if code != 0 or _lines(path) > before:
                break
        waits.append(took)
        generations.append(durable.read_lines(path / "metrics.jsonl")[-1]["seconds"])
        more = _lines(path) - before
        asked = next((line for line in child.said.splitlines() if "SIGTERM" in line), "")
        good = code == 0 and more == 1 and asked and scene.kept(path)
        wrong = None if good else f"exit code {code} after {more} generations more: {child.error}"
        trial = _resumed(scene, path, shown(asked, path))
        if wrong or trial.wrong:
            trial = Trial(False, trial.identical, trial.said, wrong or trial.wrong)
            say(f"SIGTERM, trial {number}: {trial.wrong}")
        found.append(trial)
    seconds = (
        f"ended {median(waits):.2g} s after it, at most {max(waits):.2g} s, the report with it; a "
        f"generation takes {median(generations):.2g} s"
    )
    return Row(f"SIGTERM in a generation ({seconds})", found)


def terminated_twice(scene: Scene, trials: int, random: Random, say: Callable[[str], None]) -> Row:
    """A second SIGTERM: it stops at once, the generation in flight is lost and nothing else."""
    found, waits = [], []
    for number in range(trials):
        for _ in range(_ATTEMPTS):
            path = scene.new()
            child = _in_a_generation(scene, path, random)
            child.signal(signal.SIGTERM)
            while "SIGTERM" not in child.said and child.wait(0.002) is None:
                pass
            began = time.monotonic()
            child.signal(signal.SIGTERM)
            code = child.ended()
            took = time.monotonic() - began
            if code != 0:
                break
        waits.append(took)
        error, kept = child.error, scene.kept(path)
        trial = _resumed(scene, path, error)
        if not kept or code != 130 or trial.wrong:
            trial = Trial(
                False, trial.identical, error, trial.wrong or f"exit code {code}: {error}"
            )
            say(f"second SIGTERM, trial {number}: {trial.wrong}")
        found.append(trial)
    return Row(f"a second SIGTERM (ended {median(waits):.2g} s after it)", found)


def two_processes(scene: Scene, trials: int, random: Random, say: Callable[[str], None]) -> Row:
    """A second process on a run directory, at any time: one line for it, and the first goes on."""
    found = []
    for number in range(trials):
        path = scene.new()
        first = scene.start(path)
        first.wait(random.uniform(0, 0.8 * scene.seconds))
        while not (path / ".lock").exists() and first.wait(0.002) is None:
            pass
        second = scene.start(path)
        refused = second.ended()
        code = first.ended()
        line = second.error.replace(str(first.pid), "N")
        trial = ending(scene.difference(path), code, shown(line, path), first.error)
        if trial.wrong is None and (refused != 2 or "is being written by process" not in line):
            # At the very start the second may come first; then the first is the one that is told.
            trial = Trial(False, trial.identical, line, f"the second ended with {refused}: {line}")
        if trial.wrong:
            say(f"two processes, trial {number}: {trial.wrong}")
        found.append(trial)
    return Row("a second process on the run directory", found)


def clock_jumps(scene: Scene, trials: int, random: Random, say: Callable[[str], None]) -> Row:
    """The clock jumps by up to a year, back and forth, each time it is read."""
    found = []
    for number in range(trials):
        path = scene.new()
        prepare = f"{__name__}:jump"
        child = scene.start(path, prepare, seed=random.randrange(2**31))
        child.wait(random.uniform(0.2, 0.9) * scene.seconds)
        child.signal(signal.SIGKILL)
        child.wait()
        child = scene.start(path, prepare, seed=random.randrange(2**31))
        code = child.ended()
        trial = ending(scene.difference(path), code, "", child.error)
        rows = durable.read_lines(path / "metrics.jsonl")
        if trial.wrong is None and any(not 0 <= row.get("seconds", 0) < 60 for row in rows):
            trial = Trial(False, trial.identical, "", "a generation took a time that it did not")
        if trial.wrong:
            say(f"clock jumps, trial {number}: {trial.wrong}")
        found.append(trial)
    return Row("the clock jumps by up to a year at each reading, and a `kill -9`", found)


def jump(seed: int) -> None:
    """In the run's process: the wall clock is anywhere within a year of now, for Python that asks
    `time` or `datetime`. Files get their times from the kernel, whose clock stays."""
    random = Random(seed)
    real, real_ns, dated = time.time, time.time_ns, datetime.datetime

    def off() -> float:
        return random.uniform(-_YEAR, _YEAR)

    class Jumping(datetime.datetime):
        """`now` is in C and asks no function that could be put in its place."""

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Self:
            return super().now(tz) + datetime.timedelta(seconds=off())

    time.time = lambda: real() + off()
    time.time_ns = lambda: real_ns() + int(1e9 * off())
    for module in list(sys.modules.values()):
        # Those that took the class by its name hold on to it.
        if getattr(module, "__name__", "").split(".")[0] in ("loralab", "datetime"):
            for name, value in list(vars(module).items()):
                if value is dated:
                    setattr(module, name, Jumping)


def _in_a_generation(scene: Scene, path: Path, random: Random) -> Child:
    """A run that is in a generation, at a random moment of it."""
    child = scene.start(path)
    wanted = random.randint(1, 4)
    while _lines(path) < wanted and child.wait(0.002) is None:
        pass
    child.wait(random.uniform(0, 0.03))
    if child.code is not None:
        raise UserError(f"bench resilience: a run ended before its signal: {child.said}")
    return child


def _resumed(scene: Scene, path: Path, said: str) -> Trial:
    child = scene.start(path)
    code = child.ended()
    return ending(scene.difference(path), code, said, child.error)


def _lines(path: Path) -> int:
    journal = path / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0
