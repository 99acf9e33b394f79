"""Runs that can be killed, as the benchmark holds them; `launcher` is the other end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from loralab.errors import UserError

LONGEST = 300.0
"""Seconds after which a run that should have ended is taken to hang."""


class Child:
    """A run in a process of its own. code: how it ended, minus a signal; None while it runs."""

    def __init__(self, launcher: Launcher, pid: int, output: Path) -> None:
        self._launcher, self.pid, self._output = launcher, pid, output
        self.code: int | None = None
        self.began = monotonic()

    def wait(self, seconds: float = LONGEST) -> int | None:
        """Wait until it ends, this long at most."""
        if self.code is None:
            self.code = self._launcher.ask(wait=self.pid, timeout=seconds)["code"]
        return self.code

    def ended(self) -> int:
        """Wait for its end. Raises UserError if it hangs."""
        code = self.wait()
        if code is None:
            self.signal(signal.SIGKILL)
            self.wait()
            raise UserError(f"bench resilience: a run took longer than {LONGEST:g} s: {self.said}")
        return code

    def signal(self, number: int) -> None:
        """Send it a signal, if it is there."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return monotonic() - self.began

    @property
    def said(self) -> str:
        """What it wrote so far, to the standard output and to the error output."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    @property
    def error(self) -> str:
        """The one line that it ended with; with a traceback, that it had one."""
        lines = self.said.splitlines()
        if any(line.startswith("Traceback") for line in lines):
            return f"a traceback: {lines[-1]}"
        return next((line for line in reversed(lines) if line.startswith("loralab: ")), "")


class Launcher:
    """Starts runs in forks of one process that has imported everything.

    environment: of the runs, over this process's own.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self._number = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loralab.bench.resilience.launcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self._read()

    def start(self, argv: Sequence[str], prepare: str | None = None, **options: Any) -> Child:
        """Begin `loralab ARGV`. prepare: "module:function", called in it before, with options."""
        self._number += 1
        output = self.folder / f"output-{self._number}.txt"
        words = [*map(str, argv)]
        row = {"argv": words, "output": str(output), "prepare": prepare, "options": options}
        return Child(self, self.ask(**row)["pid"], output)

    def ask(self, **row: Any) -> dict[str, Any]:
        """One question and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(row) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it and every run that is left."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError("bench resilience: the process that starts runs ended")
        row: dict[str, Any] = json.loads(line)
        return row
