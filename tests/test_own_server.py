"""A server of our own under signals: to everybody, to its driver, to what holds it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loralab.engines import leash
from loralab.engines.own_server import OwnServer

PATIENCE = 240.0
"""Seconds that something may take on a machine that is loaded."""

DRIVER = """
import signal, sys, time
from pathlib import Path
from loralab.engines.own_server import OwnServer
for name in sys.argv[2:]:
    signal.signal(signal.Signals[name], lambda *_: None)
told = Path(sys.argv[1])
command = ["sh", "-c", f"echo $$ > {told}; exec sleep 600"]
own = OwnServer(lambda port: command, lambda url: told.exists(), timeout=240)
print(own._process.pid, flush=True)
while True:
    time.sleep(1)
"""


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Driver:
    """A process in a session of its own that holds a server; it hears but survives `deaf`."""

    def __init__(self, told: Path, *deaf: str) -> None:
        words = [sys.executable, "-c", DRIVER, str(told), *deaf]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
        assert self.process.stdout is not None
        self.leash = int(self.process.stdout.readline())
        until(lambda: bool(told.read_text().strip()))
        self.server = int(told.read_text())


@pytest.fixture
def started() -> Iterator[Callable[..., Driver]]:
    made: list[Driver] = []

    def start(*words: object) -> Driver:
        made.append(Driver(*words))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for driver in made:
        driver.process.kill()
        driver.process.wait()
        for pid in (driver.leash, driver.server):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_a_dropped_terminal_takes_the_server_along(
    started: Callable[..., Driver], tmp_path: Path, number: signal.Signals
) -> None:
    driver = started(tmp_path / "pid")
    os.killpg(driver.process.pid, number)
    assert driver.process.wait(PATIENCE) == -number
    until(lambda: not runs(driver.server) and not runs(driver.leash))


def test_a_signal_to_all_leaves_the_server_to_a_driver_that_finishes(
    started: Callable[..., Driver], tmp_path: Path
) -> None:
    driver = started(tmp_path / "pid", "SIGINT", "SIGTERM")
    os.killpg(driver.process.pid, signal.SIGINT)
    os.kill(driver.leash, signal.SIGTERM)  # a scheduler reaches other sessions as well
    time.sleep(1)
    assert runs(driver.process.pid)
    assert runs(driver.leash)
    assert runs(driver.server)
    driver.process.kill()
    until(lambda: not runs(driver.server))


def test_a_killed_leash_takes_the_server_along(
    started: Callable[..., Driver], tmp_path: Path
) -> None:
    driver = started(tmp_path / "pid")
    os.kill(driver.leash, signal.SIGKILL)
    until(lambda: not runs(driver.server))


def test_a_server_that_obeys_is_not_waited_for(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    command = ["sh", "-c", f"trap 'exit 0' TERM; echo $$ > {told}; sleep 600 & wait"]
    own = OwnServer(lambda port: command, lambda url: told.exists(), timeout=PATIENCE)
    began = time.monotonic()
    own.close()
    assert time.monotonic() - began < leash.PATIENCE - 2
