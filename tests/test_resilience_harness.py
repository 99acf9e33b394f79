"""The harness says so where a run does not do what it should."""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from loralab import pipeline
from loralab.bench.resilience import kills, signals
from loralab.bench.resilience.rows import Row, Trial
from loralab.report import template

GENERATION = b"{}\n"


class Run:
    """A run that answers a signal as it is told to. code: of its end; more: lines of its journal
    that it writes after the first signal."""

    def __init__(self, path: Path, code: int, more: int) -> None:
        self.path, self.code, self._more = path, code, more
        self.said = self.error = ""

    def signal(self, number: int) -> None:
        assert number == signal.SIGTERM
        if not self.said:
            with (self.path / "journal.jsonl").open("ab") as file:
                file.write(GENERATION * self._more)
        self.said = "SIGTERM: stopping after the generation in flight"

    def ended(self) -> int:
        return self.code


def told(monkeypatch: pytest.MonkeyPatch, path: Path, case: Any, answers: list[Any]) -> Row:
    """The row of a case over runs that end one after the other in so many (code, more)."""
    left = iter(answers)

    def begun(scene: Any, folder: Path, random: Random) -> Run:
        (folder / "journal.jsonl").write_bytes(GENERATION * 3)
        (folder / "metrics.jsonl").write_text(json.dumps({"seconds": 1.0}) + "\n")
        return Run(folder, *next(left))

    def new() -> Path:
        folder = path / str(len(list(path.iterdir())))
        folder.mkdir()
        return folder

    monkeypatch.setattr(signals, "_in_a_generation", begun)
    monkeypatch.setattr(signals, "_resumed", lambda scene, folder, said: Trial(True, True, said))
    scene: Any = SimpleNamespace(new=new, kept=lambda folder: True)
    row: Row = case(scene, 1, Random(0), lambda line: None)
    assert not list(left)
    return row


@pytest.mark.parametrize(
    ("answers", "survived"),
    [
        ([(0, 1)], True),
        ([(0, 0), (0, 0), (0, 1)], True),  # fell between two
        ([(0, 0)] * 6, False),  # the generation in flight is thrown away
        ([(0, 2)], False),
        ([(130, 0)], False),
    ],
)
def test_a_sigterm_finishes_one_generation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: list[Any], survived: bool
) -> None:
    [trial] = told(monkeypatch, tmp_path, signals.terminated, answers).trials
    assert trial.survived == survived
    assert (trial.wrong is None) == survived


@pytest.mark.parametrize(
    ("answers", "survived"),
    [
        ([(130, 0)], True),
        ([(0, 1), (130, 0)], True),  # over before the second came
        ([(0, 1)] * 6, False),  # the second is ignored
        ([(2, 0)], False),
    ],
)
def test_a_second_sigterm_ends_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: list[Any], survived: bool
) -> None:
    [trial] = told(monkeypatch, tmp_path, signals.terminated_twice, answers).trials
    assert trial.survived == survived


def test_the_clock_that_runs_read_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    real, dated = time.time(), datetime.datetime
    # Set to what they are, so that they are put back.
    for module in [
        m for name, m in sys.modules.items() if name.startswith(("loralab", "datetime"))
    ]:
        for name in [name for name, value in vars(module).items() if value is dated]:
            monkeypatch.setattr(module, name, dated)
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, getattr(time, name))
    signals.jump(7)
    readings = [time.time() for _ in range(9)]
    readings += [time.time_ns() / 1e9 for _ in range(9)]
    readings += [template.datetime.datetime.now(datetime.UTC).timestamp() for _ in range(9)]
    readings += [pipeline.datetime.now().timestamp() for _ in range(9)]
    day = 24 * 3600.0
    for kind in range(4):
        times = readings[9 * kind : 9 * kind + 9]
        assert max(times) - min(times) > 30 * day
        assert all(abs(one - real) < 367 * day for one in times)
    assert dated is not datetime.datetime


def test_what_outlives_a_killed_driver_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        try:
            assert kills.outliving([process.pid], 0.2) == [sys.executable]
        finally:
            process.kill()
        # Not waited for yet: it has ended all the same.
        assert kills.outliving([process.pid], 60) == []
    assert kills.outliving([]) == []


def test_a_killed_driver_that_leaves_a_process_has_not_survived(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its child sleeps on in a session of its own."""
    code = (
        "import subprocess as s, sys, time;"
        "s.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True);"
        "time.sleep(600)"
    )
    begun: list[subprocess.Popen[bytes]] = []

    class Driver(Run):
        def __init__(self) -> None:
            super().__init__(tmp_path, -9, 0)
            begun.append(subprocess.Popen([sys.executable, "-c", code]))
            self.pid = begun[-1].pid
            while not kills.below(self.pid):
                time.sleep(0.02)

        def wait(self, seconds: float = 60.0) -> int | None:
            try:
                return begun[-1].wait(min(seconds, 60.0))
            except subprocess.TimeoutExpired:
                return None

    started: list[int] = []
    real = kills.outliving

    def soon(pids: Any, seconds: float = 0.2) -> list[str]:
        started.extend(pids)
        return real(pids, 0.2)

    monkeypatch.setattr(kills, "outliving", soon)
    scene: Any = SimpleNamespace(new=lambda: tmp_path, seconds=0.01, start=lambda path: Driver())
    try:
        row = kills.kills(kills.ClusterDriver(), scene, 1, Random(0), lambda line: None)
    finally:
        for pid in started:
            kills.os.kill(pid, signal.SIGKILL)
        for process in begun:
            process.kill()
            process.wait()
    assert not row.trials[0].survived
    assert "outlived by" in str(row.trials[0].wrong)
