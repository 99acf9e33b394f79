"""One scoring worker as its driver sees it: a process behind two pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

COMMAND = (sys.executable, "-P", "-m", "loralab.scoring.worker")


class Process:
    """A worker that starts, then answers chunk after chunk.

    ready: it has made its task. places: of the items it has not answered yet, in order. since: when
    it was given something or last answered. lines: answered and not taken. ended: its end of the
    pipe is closed.
    """

    def __init__(self, hello: Mapping[str, Any]) -> None:
        # A session of its own: a reward's own children end with it, and Ctrl-C is not for it.
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        self.answers = self._process.stdout
        os.set_blocking(self.answers.fileno(), False)
        self.ready, self.ended = False, False
        self.places: deque[int] = deque()
        self.lines: deque[bytes] = deque()
        self._rest = b""
        self.since = monotonic()
        self._write({"path": sys.path, **hello})

    def send(self, places: Sequence[int], items: Sequence[Any]) -> None:
        """Give it a chunk. It answered all before, so it reads, and the pipe cannot block us."""
        self.places.extend(places)
        self.since = monotonic()
        self._write({"items": items})

    def read(self) -> None:
        """Take what the pipe holds."""
        with suppress(BlockingIOError):
            data = os.read(self.answers.fileno(), 1 << 16)
            self.ended = not data
            *lines, self._rest = (self._rest + data).split(b"\n")
            self.lines.extend(lines)
            self.since = monotonic() if lines else self.since

    def taken(self) -> list[bytes]:
        """The lines it answered since they were last taken."""
        lines = list(self.lines)
        self.lines.clear()
        return lines

    def end(self) -> str:
        """End it and what it started, whatever they do; in words how it ended."""
        done = self._process.poll()
        if self.ended and done is None:  # the pipe is closed a moment before the process is gone
            with suppress(subprocess.TimeoutExpired):
                done = self._process.wait(timeout=1.0)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()
        self.answers.close()
        code = self._process.returncode if done is None else done
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        # One that has just ended is seen when it is read.
        with suppress(BrokenPipeError):
            self._process.stdin.write((json.dumps(row, default=os.fspath) + "\n").encode())
            self._process.stdin.flush()
