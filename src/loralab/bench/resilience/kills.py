"""`kill -9` at random times over a whole run, until it is complete.

A subject is a class: which processes of a run are its victims, and what the config needs for there
to be any.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, Protocol

from loralab.bench.resilience.child import LONGEST, Child
from loralab.bench.resilience.rows import Row, Trial, ending, general, shown
from loralab.bench.resilience.world import GENERATIONS, SLOW, Scene
from loralab.errors import UserError

_MOST_KILLS = 3
_ATTEMPTS = 20


class Subject(Protocol):
    """Processes that are killed.

    name: of its config. label: as the table has it. changes: sections of the config.
    ends_run: whether the run ends with its victim, and is resumed; else it has to go on by itself.
    """

    name: str
    label: str
    changes: Mapping[str, Any]
    ends_run: bool

    def victims(self, driver: int) -> list[int]:
        """Process ids that may be killed now."""
        ...


class Driver:
    """The process that the user started."""

    name, label, ends_run = "plain", "the driver", True
    changes: Mapping[str, Any] = {}

    def victims(self, driver: int) -> list[int]:
        """The driver itself."""
        return [driver]


class ScoringWorker:
    """A process that scores, and what it started."""

    name, label, ends_run = "scored", "a scoring process", False
    changes: Mapping[str, Any] = {"scoring": {"deadline": 60.0, "workers": 2}}

    def victims(self, driver: int) -> list[int]:
        """Those below the driver."""
        return [pid for pid in below(driver) if b"loralab.scoring.worker" in told(pid)]


class Actor:
    """A Ray actor of a run on a cluster of its own, with two of them."""

    name, label, ends_run = "cluster", "a Ray actor", False
    # Long generations, or a run would be over before one of its actors is met.
    changes: Mapping[str, Any] = {**SLOW, "cluster": {"actors": 2, "restarts": 100}}

    def victims(self, driver: int) -> list[int]:
        """Actors name themselves so while they live."""
        return [pid for pid in below(driver) if told(pid).startswith(b"ray::Worker")]


class ClusterDriver(Driver):
    """The driver of a run on a cluster: what it started has to end with it."""

    name, label = "cluster", "the driver of a Ray cluster"
    changes = Actor.changes


SUBJECTS: tuple[Callable[[], Subject], ...] = (Driver, ScoringWorker, Actor, ClusterDriver)


def kills(
    subject: Subject, scene: Scene, trials: int, random: Random, say: Callable[[str], None]
) -> Row:
    """So many runs, each with one to three kills that met a living process."""
    found, when = [], Counter[str]()
    window = (0.0, scene.seconds) if subject.ends_run else _window(subject, scene)
    for number in range(trials):
        found.append(_trial(subject, scene, window, random, when))
        if found[-1].wrong:
            say(f"{subject.label}, trial {number}: {found[-1].wrong}")
    told = ", ".join(f"{count} {name}" for name, count in sorted(when.items()))
    return Row(f"`kill -9` of {subject.label} ({sum(when.values())} kills: {told})", found)


def _window(subject: Subject, scene: Scene) -> tuple[float, float]:
    """From when to when, in seconds, an undisturbed run has victims."""
    child, seen = scene.start(scene.new()), []
    while child.wait(0.02) is None:
        if subject.victims(child.pid):
            seen.append(child.seconds)
    if not seen:
        raise UserError(f"bench resilience: {subject.label} is never there to be killed")
    return seen[0], seen[-1]


def _trial(
    subject: Subject,
    scene: Scene,
    window: tuple[float, float],
    random: Random,
    when: Counter[str],
) -> Trial:
    for _ in range(_ATTEMPTS):
        path, hits, wanted = scene.new(), 0, random.randint(1, _MOST_KILLS)
        child = scene.start(path)
        lived, pause = True, random.uniform(*window)
        while hits < wanted and child.wait(pause) is None:
            victims = subject.victims(child.pid)
            pause = 0.01
            if not victims:
                continue
            at, started = _progress(path), below(child.pid)
            with suppress(ProcessLookupError):
                os.kill(random.choice(victims), signal.SIGKILL)
                hits += 1
                when[at] += 1
            if subject.ends_run:
                _gone(child)
                left = outliving(started)
                if left:
                    return ending(f"outlived by {', '.join(left)}", child.ended(), "", "")
                lived = lived and scene.kept(path)
                child = scene.start(path)
                pause = random.uniform(*window)
            else:
                pause = random.uniform(0, window[1] - window[0])
        code = child.ended()
        if hits:
            difference = scene.difference(path) if lived else "a journal was lost at a kill"
            return ending(difference, code, _told(child, path), child.error)
    raise UserError(f"bench resilience: {subject.label} was never met")


def _gone(child: Child) -> None:
    if child.wait() is None:
        raise UserError(f"bench resilience: a killed process is there after {LONGEST:g} s")


def outliving(pids: Sequence[int], seconds: float = LONGEST) -> list[str]:
    """Programs of these processes that are still there after so long; [] as soon as none is."""
    until = time.monotonic() + seconds
    while (left := [pid for pid in pids if _lives(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return [told(pid).split(b"\0")[0].decode(errors="replace") for pid in left]


def _lives(pid: int) -> bool:
    """Not of one that has ended and whose parent has not taken note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _progress(path: Path) -> str:
    """What a run is doing, as its journal tells."""
    journal = path / "journal.jsonl"
    lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
    if lines == 0:
        return "before the first generation"
    return "in a generation" if lines <= GENERATIONS else "after the last"


def _told(child: Child, path: Path) -> str:
    """The line of a run that tells that it went on."""
    for line in child.said.splitlines():
        if " is gone: " in line:
            # What Ray says of the reason is another text each time.
            return general(shown(line, path)).partition(" (")[0]
        if "resumed at generation" in line:
            return general(line[line.index("resumed at generation") :])
    return ""


def below(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    parents: dict[int, list[int]] = {}
    for one, parent in _parents():
        parents.setdefault(parent, []).append(one)
    found, left = [], [pid]
    while left:
        more = parents.get(left.pop(), [])
        found += more
        left += more
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                yield (
                    int(folder.name),
                    int((folder / "stat").read_text().rpartition(")")[2].split()[1]),
                )


def told(pid: int) -> bytes:
    """A process's command line, as it has it now; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
