"""What runs inside the new process: isolate it, limit it, and let the code run.

Three processes. The outermost (`main`) stays in the machine's process namespace, waits, and ends
the others when it gets SIGTERM. The keeper is process 1 of the new namespace: with it everything
in there dies. The worker runs the code, and holds nothing but its output and its one channel.

Standard library alone; imported by path, without loralab's own start-up.
"""

from __future__ import annotations

import contextlib
import ctypes  # noqa: F401  (here while its library can be found: the worker has no machine)
import json
import os
import resource
import select
import signal
import sys
from typing import Any, NoReturn

from loralab.sandbox import judge, namespaces, solution

_FAILED = 125


def main() -> NoReturn:
    """Read the job from standard input, run it, and end with the worker's status."""
    job: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    status = job["status"]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    alive, keep = os.pipe()
    try:
        if job["isolate"]:
            limits = job["limits"]
            namespaces.isolate(job["visible"], limits["folder_bytes"], limits["folder_files"])
        else:
            os.chdir(job["folder"])
            with contextlib.suppress(AttributeError, OSError):
                namespaces.adopt_orphans()
        with contextlib.suppress(AttributeError):
            namespaces.die_with_parent(signal.SIGTERM)
        if os.getppid() != job["parent"]:
            os._exit(_FAILED)
        keeper = os.fork()
        if keeper == 0:
            os.close(keep)
            _keep(job, alive)
    except Exception as error:
        _say(status, {"error": solution.describe(error)})
        os._exit(_FAILED)
    os.close(status)

    def end(*_: object) -> None:
        os.kill(keeper, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _, result = os.waitpid(keeper, 0)
    if not job["isolate"]:
        _end_descendants()
    os._exit(_code(result))


def _keep(job: dict[str, Any], alive: int) -> NoReturn:
    """Process 1: start the worker without privileges, and end with it."""
    status = job["status"]
    try:
        if job["isolate"]:
            namespaces.drop_privileges()
        with contextlib.suppress(AttributeError):
            namespaces.die_with_parent(signal.SIGKILL)
        if select.select([alive], [], [], 0)[0]:
            os._exit(_FAILED)  # the parent ended before the kernel was told to end this too
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        worker = os.fork()
        if worker == 0:
            _work(job)
        for handle in range(3):
            os.close(handle)
        with contextlib.suppress(OSError):
            os.close(job["channel"])
        _say(status, {"ready": True})
        while True:
            ended, result = os.wait()
            if ended == worker:
                os._exit(_code(result))
    except Exception as error:
        _say(status, {"error": solution.describe(error)})
        os._exit(_FAILED)


def _work(job: dict[str, Any]) -> NoReturn:
    """Run the code (or the tests) under limits, and report on the channel that this role has."""
    code = 1
    channel = job["channel"]
    try:
        os.setsid()
        _feed(job["stdin"])
        role = job["role"]
        keep = {0, 1, 2, channel}
        if role != "solution":
            keep.add(job["report"])
        for handle in range(3, 256):
            if handle not in keep:
                with contextlib.suppress(OSError):
                    os.close(handle)
        _limit(job["limits"])
        if role == "solution":
            solution.serve(job["code"], channel)
        elif role == "judge":
            held, reason = judge.judge(channel, job["setup"], job["names"], job["tests"])
            _say(job["report"], {"tests": held, "reason": reason})
        else:
            reason = ""
            try:
                solution.run_program(job["code"])
            except BaseException as error:
                reason = solution.describe(error)
            sys.stdout.flush()
            _say(job["report"], {"tests": [], "reason": reason, "finished": not reason})
        code = 0
    finally:
        # Not sys.exit: exit hooks and threads of the code have no turn any more.
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def _feed(text: str) -> None:
    """Put text where standard input was; not through a pipe, which takes only so much."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("stdin")
    else:
        handle = os.open("stdin", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.unlink("stdin")
    with open(handle, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "replace"))
    os.lseek(handle, 0, os.SEEK_SET)
    os.dup2(handle, 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (the code's own)


def _limit(limits: dict[str, int]) -> None:
    for name, most in (
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_CPU", limits["cpu_seconds"]),
        ("RLIMIT_FSIZE", limits["folder_bytes"]),
        ("RLIMIT_NOFILE", limits["open_files"]),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MSGQUEUE", 0),
        ("RLIMIT_MEMLOCK", 0),
    ):
        kind = getattr(resource, name, None)
        if kind is not None:
            with contextlib.suppress(ValueError, OSError):  # macOS knows them and takes few
                resource.setrlimit(kind, (most, most))


def _end_descendants() -> None:
    """Without a namespace: kill what is left until nothing is (Linux; orphans come to us)."""
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = [int(word) for word in file.read().split()]
        except OSError:
            return
        if not children:
            return
        for child in children:
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.wait()


def _code(result: int) -> int:
    return 128 + os.WTERMSIG(result) if os.WIFSIGNALED(result) else os.WEXITSTATUS(result)


def _say(handle: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        os.write(handle, json.dumps(message).encode("ascii") + b"\n")
