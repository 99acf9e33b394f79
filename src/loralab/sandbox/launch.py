"""Start the jailed processes, watch them, and say what became of the code."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loralab.errors import UserError

Status = Literal["passed", "failed", "finished", "timeout", "memory", "output"]

OUTPUT_BYTES = 1 << 20
"""A program that writes more than this is stopped."""

_PROCESSES = 32
_OPEN_FILES = 64
_FOLDER_BYTES = 32 << 20
_FOLDER_FILES = 1_000
_LEAST_MEMORY = 64
_START_SECONDS = 30.0
_LOOK_SECONDS = 0.02
_SETUP_LINE = 1 << 16

# Empty stand-ins for the two packages above `jail`: their own modules are not for the jail.
_BOOT = """\
import sys, types
for name, path in (("loralab", {outer!r}), ("loralab.sandbox", {inner!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from loralab.sandbox.jail import main
main()
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    status: "passed": every test held. "failed": a test did not, or the program raised or ended
        before its end. "finished": without tests, the program came to its end (its own word: see
        the package's docstring). "timeout", "memory", "output": stopped for going over a limit.
    tests: whether each test held.
    reason: one line about the failure, "" where there is none.
    stdout, stderr: what the program wrote.
    seconds: from when the code began.
    """

    status: Status
    tests: tuple[bool, ...]
    reason: str
    stdout: str
    stderr: str
    seconds: float

    @property
    def passed(self) -> bool:
        """There were tests, and all held."""
        return self.status == "passed"


def run(
    code: str,
    *,
    timeout: float = 5.0,
    memory_mb: int = 512,
    tests: Sequence[str] = (),
    setup: str = "",
    names: Sequence[str] = (),
    stdin: str = "",
    unsafe: bool = False,
) -> Outcome:
    """Run untrusted Python code in a jail, and trusted tests of what it defines in another.

    code: a program; the standard library is all it has, and it ends with its main thread.
    timeout: seconds from when it begins; then it and all it started are killed.
    memory_mb: MiB of address space of each of its processes, and resident in all together.
    tests: statements that hold unless they raise, run in order in one namespace.
    setup: trusted code that the tests need, run before they take `names` from the code.
    names: what the tests take from the code: functions, classes, values.
    stdin: what the program can read.
    unsafe: run without isolation where this machine offers none.

    >>> run("def add(a, b): return a + b", tests=["assert add(1, 2) == 3"], names=["add"]).passed
    True

    Raises:
        UserError: no isolation here and `unsafe` not set, or a limit that cannot be.
    """
    if not (math.isfinite(timeout) and 0 < timeout <= 3600):
        raise UserError(f"sandbox: timeout is {timeout}, expected over 0 and up to 3600 seconds")
    if memory_mb < _LEAST_MEMORY:
        raise UserError(f"sandbox: memory_mb is {memory_mb}, expected {_LEAST_MEMORY} or more")
    missing = why_not_isolated()
    if missing and not unsafe:
        raise UserError(
            f"sandbox: this machine cannot isolate generated code ({missing}); allow user "
            "namespaces (docs/sandbox.md), or accept the risk with --unsafe-exec"
        )
    try:
        return _run(code, timeout, memory_mb, tests, setup, names, stdin, isolate=not missing)
    except _SetupError as error:
        raise UserError(f"sandbox: it could not be started: {error}") from error


@functools.cache
def why_not_isolated() -> str:
    """Why code cannot be isolated here, "" where it can. Found by trying, once."""
    if sys.platform != "linux":
        return f"{sys.platform} has no user namespaces"
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release < (5, 14):
        return f"Linux {os.uname().release} does not count processes by namespace; 5.14 does"
    try:
        outcome = _run("print('x')", 20.0, 512, (), "", (), "", isolate=True)
    except _SetupError as error:
        return str(error)
    return "" if outcome.stdout == "x\n" else outcome.reason or outcome.stderr or outcome.status


class _SetupError(Exception):
    """The jail could not be built."""


def _run(
    code: str,
    timeout: float,
    memory_mb: int,
    tests: Sequence[str],
    setup: str,
    names: Sequence[str],
    stdin: str,
    *,
    isolate: bool,
) -> Outcome:
    limits = {
        "memory_bytes": memory_mb << 20,
        "cpu_seconds": math.ceil(timeout) + 1,
        "folder_bytes": _FOLDER_BYTES,
        "folder_files": _FOLDER_FILES,
        "open_files": _OPEN_FILES,
        "processes": _PROCESSES,
    }
    common = {"limits": limits, "isolate": isolate}
    with contextlib.ExitStack() as stack:
        if tests:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                trusted = {
                    "role": "judge", "setup": setup, "names": list(names), "tests": list(tests),
                    "stdin": "", "channel": ours.fileno(), **common,
                }  # fmt: skip
                untrusted = {
                    "role": "solution", "code": code, "stdin": stdin,
                    "channel": theirs.fileno(), **common,
                }  # fmt: skip
                judge = stack.enter_context(_started(trusted, quiet=True))
                program = stack.enter_context(_started(untrusted))
        else:
            alone = {"role": "program", "code": code, "stdin": stdin, "channel": -1, **common}
            judge = program = stack.enter_context(_started(alone))
        broken, seconds = _watch(judge, program, timeout, memory_mb << 20)
    return _outcome(judge, program, broken, seconds, len(tests))


def _outcome(
    judge: _Process, program: _Process, broken: Status | None, seconds: float, tests: int
) -> Outcome:
    verdict: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        verdict = json.loads(judge.read["report"].split(b"\n")[0])
    held = tuple(verdict.get("tests", ()))
    reason = str(verdict.get("reason", ""))
    status: Status
    if broken is not None:
        status, held = broken, (False,) * tests
        reason = f"stopped: over the limit of {'time' if broken == 'timeout' else broken}"
    elif tests:
        status = "passed" if len(held) == tests and all(held) else "failed"
    else:
        status = "finished" if verdict.get("finished") is True else "failed"
    if status == "failed" and not reason:
        code = program.process.returncode
        how = f"killed by signal {code - 128}" if code > 128 else f"exit status {code}"
        reason = f"ended early: {how}"
    return Outcome(
        status,
        held or (False,) * tests,
        reason,
        program.read["stdout"].decode("utf-8", "replace"),
        program.read["stderr"].decode("utf-8", "replace"),
        seconds,
    )


@dataclass
class _Process:
    """One jail from outside. read: what came from each of its pipes."""

    process: subprocess.Popen[bytes]
    pipes: dict[str, int]
    read: dict[str, bytearray] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether its code may run by now."""
        return b"\n" in self.read["status"]

    @property
    def complaint(self) -> str:
        """Why it could not be built."""
        with contextlib.suppress(ValueError):
            return str(json.loads(self.read["status"].split(b"\n")[0]).get("error", ""))
        return ""


@contextlib.contextmanager
def _started(job: dict[str, Any], quiet: bool = False) -> Iterator[_Process]:
    """A jail that is gone, with everything in it, when the block ends."""
    inner = Path(__file__).parent
    boot = _BOOT.format(outer=str(inner.parent), inner=str(inner))
    # Not -I, which ignores the hash seed that makes a program's answer the same each time. With -u
    # nothing is lost of what a program that has to be killed wrote.
    command = [sys.executable, "-s", "-S", "-P", "-B", "-u", "-X", "utf8", "-c", boot]
    environment = {"HOME": "/tmp", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    with contextlib.ExitStack() as stack:
        folder = str(Path(sys.prefix).anchor)
        if not job["isolate"]:
            made = tempfile.TemporaryDirectory(prefix="loralab-", ignore_cleanup_errors=True)
            folder = environment["HOME"] = stack.enter_context(made)
        ends: dict[str, tuple[int, int]] = {name: os.pipe() for name in ("status", "report")}
        given = [end for _, end in ends.values()]
        try:
            job = {
                **job, "status": given[0], "report": given[1], "parent": os.getpid(),
                "visible": _visible(), "folder": folder,
            }  # fmt: skip
            output = subprocess.DEVNULL if quiet else subprocess.PIPE
            channel = [job["channel"]] if job["channel"] >= 0 else []
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=folder,
                pass_fds=[*given, *channel],
                start_new_session=True,
            )
        finally:
            for end in given:
                os.close(end)
        pipes = {name: end for name, (end, _) in ends.items()}
        for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
            if stream is not None:
                pipes[name] = stream.fileno()
        names = ("status", "report", "stdout", "stderr")
        started = _Process(process, pipes, {name: bytearray() for name in names})
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(job).encode("ascii"))
            yield started
        finally:
            _end(process)
            for end, _ in ends.values():
                os.close(end)
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """The outermost process ends all the others and waits for them; then it ends."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _watch(
    judge: _Process, program: _Process, timeout: float, memory: int
) -> tuple[Status | None, float]:
    """Wait for the verdict. Which limit was broken, if any, and the seconds the code took."""
    both = (judge,) if judge is program else (judge, program)
    began: float | None = None
    start = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for process in both:
            for name, handle in process.pipes.items():
                os.set_blocking(handle, False)
                selector.register(handle, selectors.EVENT_READ, (process, name))
        while True:
            now = time.monotonic()
            for process in both:
                if process.complaint:
                    raise _SetupError(process.complaint)
            if began is None:
                if all(process.ready for process in both):
                    began = now
                elif now - start > _START_SECONDS:
                    raise _SetupError(f"it did not start within {_START_SECONDS:g} seconds")
            elapsed = 0.0 if began is None else now - began
            if elapsed > timeout:
                return "timeout", elapsed
            if _resident(program.process.pid) > memory:
                return "memory", elapsed
            if judge.process.poll() is not None:
                for process in both:
                    for name, handle in process.pipes.items():
                        _drain(process, name, handle)
                return (_over(program), elapsed)
            for key, _ in selector.select(_LOOK_SECONDS):
                process, name = key.data
                if not _drain(process, name, key.fd):
                    selector.unregister(key.fd)
            if _over(program) is not None:
                return "output", elapsed


def _over(program: _Process) -> Status | None:
    written = len(program.read["stdout"]) + len(program.read["stderr"])
    return "output" if written > OUTPUT_BYTES else None


def _drain(process: _Process, name: str, handle: int) -> bool:
    """Read what is there; False at the end of the pipe."""
    room = _SETUP_LINE if name in ("status", "report") else OUTPUT_BYTES + 1
    while True:
        try:
            part = os.read(handle, 1 << 16)
        except BlockingIOError:
            return True
        if not part:
            return False
        process.read[name] += part[: max(0, room - len(process.read[name]))]
        if len(process.read[name]) >= room:
            return name in ("stdout", "stderr")


def _resident(process: int) -> int:
    """Bytes of memory of a process and its descendants, what they share with files apart."""
    total = 0
    waiting = [process]
    while waiting:
        one = waiting.pop()
        try:
            _, resident, shared = Path(f"/proc/{one}/statm").read_text().split()[:3]
            total += (int(resident) - int(shared)) * _PAGE
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, ValueError):
            continue
    return total


_PAGE = os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _visible() -> list[str]:
    """Folders that running Python code needs: its standard library and shared libraries."""
    wanted = [
        os.path.dirname(os.__file__),
        sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix}),
        *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store"),
    ]
    found: list[str] = []
    for folder in sorted({os.path.normpath(folder) for folder in wanted}):
        outer = any(folder.startswith(f"{other}/") for other in found)
        if not outer and os.path.exists(folder):
            found.append(folder)
    return found
