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
from loralab.errors import UserError

LOOPBACK = "127.0.0.1"
_TAIL = 4
"""Lines of a log that an error tells."""
_LOOK = 0.25
"""Seconds between two looks at a server that starts."""


class OwnServer:
    """A command that serves on a port of this machine, its output in a log.

    command: gives the command for a port. ready: asks whether the server at a URL answers. Ends
    with `close` or with this process, however that ends. private: files that it reads when it
    starts, removed with it. The log of a server that was closed in order is removed.

    Raises:
        UserError: it cannot be started, ends before it is ready, or is not ready in time.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        ready: Callable[[str], bool],
        *,
        timeout: float,
        private: Sequence[Path] = (),
    ) -> None:
        self._command = command
        self._private = tuple(private)
        self._ready = ready
        self._timeout = timeout
        handle, name = tempfile.mkstemp(prefix="loralab-server-", suffix=".log")
        os.close(handle)
        self.log = Path(name)
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes]], OwnServer] | None = None
        weakref.finalize(self, _forget, self._private)
        self.start()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, anew if it runs, on a free port."""
        self._stop()
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        command = [sys.executable, leash.__file__, *self._command(port)]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        self._process = process
        self._end = weakref.finalize(self, _let_go, process)
        deadline = time.monotonic() + self._timeout
        while not self._ready(self.url):
            if process.poll() is not None:
                raise UserError(f"the server ended before it was ready{self._said()}")
            if time.monotonic() > deadline:
                self._stop()
                raise UserError(f"the server was not ready after {self._timeout:g} s{self._said()}")
            time.sleep(_LOOK)

    def close(self) -> None:
        """End it; remove its log and its private files."""
        self._stop()
        _forget((self.log, *self._private))

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


def _forget(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(2 * leash.PATIENCE + 5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
