"""A server of our own under signals: to everybody, to its driver, to what holds it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loralab.engines import leash, memory_folder, own_server
from loralab.engines.memory_folder import MemoryFolder
from loralab.engines.own_server import OwnServer, listeners
from loralab.errors import UserError
from watched_processes import PATIENCE, runs, until

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
    assert runs(driver.process.pid)


def test_a_server_that_obeys_is_not_waited_for(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    command = ["sh", "-c", f"trap 'exit 0' TERM; echo $$ > {told}; sleep 600 & wait"]
    own = OwnServer(lambda port: command, lambda url: told.exists(), timeout=PATIENCE)
    began = time.monotonic()
    own.close()
    assert time.monotonic() - began < leash.PATIENCE - 2


def test_a_port_that_another_took_meanwhile_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, tried = own_server.free_port, []
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr(own_server, "free_port", lambda: plain() if tried else taken)

        def command(port: int) -> list[str]:
            tried.append(port)
            return ["sh", "-c", "sleep 1; exit 1" if port == taken else "sleep 600"]

        asked: list[str] = []

        def ready(url: str) -> bool:
            asked.append(url)
            return not url.endswith(str(taken))

        own = OwnServer(command, ready, timeout=PATIENCE)
        assert tried[0] == taken
        assert own.url.endswith(str(tried[1]))
        assert len(tried) == 2
        own.close()


def test_a_port_of_another_user_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as here:
        assert listeners(here.getsockname()[1]) == {os.getuid()}
    monkeypatch.setattr(own_server, "listeners", lambda port: {os.getuid() + 1})

    def ready(url: str) -> bool:
        raise AssertionError("it was asked")

    with pytest.raises(UserError, match="found its port taken, 4 times"):
        OwnServer(lambda port: ["sleep", "600"], ready, timeout=PATIENCE)


def test_private_files_go_with_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    private = MemoryFolder()
    (private.path / "key").write_text("secret")
    own = OwnServer(
        lambda port: ["sleep", "600"], lambda url: True, timeout=PATIENCE, private=private
    )
    own.close()
    assert not private.path.exists()
    assert not own.log.exists()


def test_a_sweep_that_is_cut_leaves_what_the_next_one_finds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = MemoryFolder(str(tmp_path))
    (made.path / "member").mkdir()
    (made.path / "note").write_text("x")
    removed: list[str] = []

    def cut(path: Path, **_: object) -> None:
        removed.append(path.name)
        if path.name == made.path.name:
            assert [entry.name for entry in path.iterdir()][:1] in (["lock"], ["member"])
            assert not (path / "note").exists()
            assert (path / "lock").exists()

    monkeypatch.setattr(memory_folder.shutil, "rmtree", cut)
    made.close()
    assert removed == ["member", made.path.name]
