"""Ways to train, each in a process of its own, that take turns on one core.

Peak memory is then each way's own, and so is whatever a library does to a process. While one takes
its steps the others stand still inside their training loops (`gate`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from loralab.bench.command import Say
from loralab.bench.timing import Lap, Timed, take_turns
from loralab.bench.work import Work
from loralab.errors import UserError

COMMAND = (sys.executable, "-m", "loralab.bench.worker")


@dataclass(frozen=True)
class Way:
    """A way to train. run: "module:function", called with a `Work` and a `Gate`."""

    label: str
    run: str


@dataclass(frozen=True)
class StepLap(Lap):
    """A lap of training steps; `tokens` are those through the model, padding left out.

    learned: tokens with a label. checksum: of the rows. losses: of each step. peak_gb: highest
    resident memory of the process since it began.
    """

    learned: int
    checksum: int
    losses: tuple[float, ...]
    peak_gb: float


class Worker:
    """A process that trains one way.

    Raises:
        UserError: it cannot train this way here, and why.
    """

    def __init__(self, way: Way, work: Work) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  open while the process runs
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            self.ready_gb = float(self._ask(way=way.run, work=asdict(work))["peak_gb"])
        except BaseException:
            self.close()
            raise

    def lap(self, warm: int, steps: int) -> StepLap:
        """Take steps: some that are not measured, then those of the lap."""
        said = self._ask(warm=warm, steps=steps)
        return StepLap(load=0.0, **{**said, "losses": tuple(said["losses"])})

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = [text for text in self._log.read().splitlines() if text.strip()]
            raise RuntimeError(f"it ended: {said[-1] if said else 'it wrote nothing'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer


@dataclass(frozen=True)
class Race:
    """What each way took. skipped: why the others are not in it."""

    timed: Mapping[str, Timed]
    peaks: Mapping[str, float]
    skipped: Mapping[str, str]

    def laps(self, name: str) -> tuple[StepLap, ...]:
        return tuple(lap for lap in self.timed[name].laps if isinstance(lap, StepLap))


def race(
    ways: Mapping[str, Way],
    work: Work,
    laps: int,
    steps: int,
    warm: int,
    say: Say = lambda _: None,
    beside: Mapping[str, Callable[[], Lap]] | None = None,
) -> Race:
    """Let the ways take turns: `laps` of each, of `steps` steps after `warm` unmeasured ones.

    beside: what else takes turns with them, in this process.

    Raises:
        RuntimeError: a way ended, or trained on other rows than the first.
    """
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    try:
        for name, way in ways.items():
            try:
                workers[name] = Worker(way, work)
            except UserError as error:
                skipped[name] = str(error)
                say(f"{name}: skipped: {error}")
                continue
            say(f"{name}: ready, {workers[name].ready_gb:.2f} GB")
        lanes: dict[str, Callable[[], Lap]] = {
            name: lambda worker=worker: worker.lap(warm, steps)  # type: ignore[misc]
            for name, worker in workers.items()
        }
        timed = take_turns(
            {**lanes, **(beside or {})}, laps, on_lap=lambda *lap: say(describe(*lap))
        )
    finally:
        for worker in workers.values():
            worker.close()
    found = Race(timed, {}, skipped)
    same_rows({name: found.laps(name) for name in workers})
    return Race(timed, {name: found.laps(name)[-1].peak_gb for name in workers}, skipped)


def chosen(names: Sequence[str], ways: Mapping[str, Way]) -> dict[str, Way]:
    """The ways of these names, all without any, in the order of the table.

    Raises:
        UserError: a name that is none of them.
    """
    for name in names:
        if name not in ways:
            raise UserError(f"way {name!r} is unknown; expected of {', '.join(ways)}")
    return {name: way for name, way in ways.items() if not names or name in names}


def same_rows(laps: Mapping[str, tuple[StepLap, ...]]) -> None:
    """See that every way saw the same tokens in each lap, and learned the same number of them.

    Raises:
        RuntimeError: one did not, and the speeds would not compare.
    """
    expected: list[tuple[int, int, int]] | None = None
    for name, own in laps.items():
        seen = [(lap.tokens, lap.learned, lap.checksum) for lap in own]
        expected = seen if expected is None else expected
        if seen != expected:
            raise RuntimeError(f"{name} trained on other rows than {next(iter(laps))}")


def describe(name: str, turn: int, lap: Lap) -> str:
    """A lap in words, for whoever watches."""
    text = f"{turn + 1} {name}: {lap.tokens / lap.run:.0f} tokens/s, {lap.run:.2f} s"
    if isinstance(lap, StepLap):
        text += f", peak {lap.peak_gb:.2f} GB, loss {lap.losses[-1]:.4f}"
    return text
