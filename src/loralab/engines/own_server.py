"""A server process of ours: started on this machine, waited for, ended with this process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from loralab.engines import leash
from loralab.engines.memory_folder import MemoryFolder
from loralab.errors import UserError

LOOPBACK = "127.0.0.1"
_TAIL = 4
"""Lines of a log that an error tells."""
_LOOK = 0.25
"""Seconds between two looks at a server that starts."""
_LISTEN = "0A"
"""The state of a socket that takes connections, in Linux's tables."""
_PORTS = 4
"""Ports that are tried, should others take them before the server does."""


class OwnServer:
    """A command that serves on a port of this machine, its output in a log.

    command: gives the command for a port. ready: asks whether the server at a URL answers. Ends
    with `close` or with this process, however that ends. private: a folder of files that it reads
    when it starts, removed with it. The log of a server that was closed in order is removed.

    The port is only known to be free: minutes may pass until the server listens there. Where
    another process has taken it by then, which may be another user's and is told nothing, the
    server is started again on another.

    Raises:
        UserError: it cannot be started, ends before it is ready, or is not ready in time.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        ready: Callable[[str], bool],
        *,
        timeout: float,
        private: MemoryFolder | None = None,
    ) -> None:
        self._command = command
        self._private = private
        self._ready = ready
        self._timeout = timeout
        handle, name = tempfile.mkstemp(prefix="loralab-server-", suffix=".log")
        os.close(handle)
        self.log = Path(name)
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes]], OwnServer] | None = None
        self.start()

    def start(self) -> None:
        """Start it, anew if it runs, on a free port."""
        deadline = time.monotonic() + self._timeout
        for _ in range(_PORTS):
            self._stop()
            port = free_port()
            self.url = f"http://{LOOPBACK}:{port}"
            if self._is_ready(self._launch(port), port, deadline):
                return
        self._stop()
        raise UserError(f"the server found its port taken, {_PORTS} times{self._said()}")

    def _launch(self, port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, leash.__file__, *self._command(port)]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        self._process = process
        self._end = weakref.finalize(self, _let_go, process)
        return process

    def _is_ready(self, process: subprocess.Popen[bytes], port: int, deadline: float) -> bool:
        """Wait until it is; False if another process listens on its port."""
        while True:
            ended = process.poll() is not None
            listening = listeners(port)
            if listening - {0, os.getuid()} or (ended and listening):
                return False
            if ended:
                raise UserError(f"the server ended before it was ready{self._said()}")
            # Who answers may be another, and ours about to end for it.
            if self._ready(self.url) and process.poll() is None:
                return True
            if time.monotonic() > deadline:
                self._stop()
                raise UserError(f"the server was not ready after {self._timeout:g} s{self._said()}")
            time.sleep(_LOOK)

    def close(self) -> None:
        """End it; remove its log and its private files."""
        self._stop()
        self.log.unlink(missing_ok=True)
        if self._private is not None:
            self._private.close()

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _said(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f" (log: {self.log}): {' | '.join(lines[-_TAIL:])[-600:]}"


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.create_server((LOOPBACK, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def listeners(port: int) -> set[int]:
    """Ids of the users whose processes listen on a port of this machine; none where it does not
    tell (other than Linux)."""
    users = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, _, state, _, _, _, user, *_ = row.split()
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                users.add(int(user))
    return users


def _let_go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(2 * leash.PATIENCE + 5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
