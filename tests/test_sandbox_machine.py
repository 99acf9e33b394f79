"""The sandbox against code that breaks out or breaks things.

After each attack the machine has to be as it was: this process unharmed, no process and no file
left.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from loralab import sandbox
from loralab.sandbox import launch
from sandboxed import needs_isolation

MARK = f"# {uuid.uuid4()}"


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give these tests' processes a command line that no others have, to find what is left."""
    monkeypatch.setattr(launch, "_BOOT", launch._BOOT + MARK)


@pytest.fixture
def marker() -> Iterator[Path]:
    """A file outside of every sandbox that an attack may try to reach."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        file = Path(folder) / "marker"
        file.write_text("whole")
        yield file
        assert file.read_text() == "whole"
        assert [file] == list(Path(folder).iterdir())


@needs_isolation
@pytest.mark.parametrize(
    ("attempt", "refused"),
    [
        ("open({path!r}, 'w').write('x')", "NotFound"),
        ("open({path!r} + '2', 'w').write('x')", "NotFound"),
        ("open({path!r}).read()", "NotFound"),
        ("import shutil, os; shutil.rmtree(os.path.dirname({path!r}))", "NotFound"),
        ("import shutil; shutil.rmtree(__import__('pwd').getpwuid(0).pw_dir)", "Error"),
        ("open('/etc/passwd').read()", "NotFound"),
        ("open('/x', 'w')", "Read-only"),
        ("import os; open(os.path.dirname(os.__file__) + '/x', 'w')", "Error"),
        ("import os; os.symlink('/../../..' + {path!r}, 'l'); open('l', 'w')", "NotFound"),
        ("import os; os.link({path!r}, 'l')", "NotFound"),
        ("import os; os.chroot('/tmp')", "not permitted"),
        ("import os; os.mknod('d', 0o60666, os.makedev(254, 0))", "not permitted"),
        ("import os; os.setuid(0)", "not permitted"),
        ("import socket; socket.create_connection(('127.0.0.1', {port}), 2)", "unreachable"),
        ("import socket; socket.create_connection(('1.1.1.1', 53), 2)", "unreachable"),
        ("import socket as s; s.socket(s.AF_UNIX).connect({path!r})", "NotFound"),
        ("import socket as s; s.socket(s.AF_UNIX).connect(chr(0) + 'loralab-test')", "refused"),
        ("import fcntl, termios; fcntl.ioctl(0, termios.TIOCSTI, b'x')", "nappropriate ioctl"),
        ("open('/dev/tty', 'w').write('x')", "Read-only"),
        ("import os; os.kill({pid}, 9)", "No such process"),
        ("import os; open('/proc/{pid}/environ').read()", "NotFound"),
        ("import os; print(open('/proc/self/mounts').read())", "NotFound"),
        ("import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])", "NotFound"),
        ("import os; os.environ['LORALAB_SECRET']", "KeyError"),
        (
            "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
            "assert c.ptrace(16, {pid}, 0, 0) == 0, ctypes.get_errno()",
            "AssertionError",
        ),
        (
            "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
            "assert c.ptrace(16, 1, 0, 0) == 0, ctypes.get_errno()",
            "AssertionError",
        ),
        (
            "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
            "assert c.unshare(0x10000000) == 0, ctypes.get_errno()",
            "AssertionError",
        ),
        (
            "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
            "assert c.mount(b't', b'/tmp', b'tmpfs', 0, None) == 0, ctypes.get_errno()",
            "AssertionError",
        ),
    ],
)
def test_what_is_refused(
    attempt: str, refused: str, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attacks on the machine: the code goes on to prove what it managed."""
    monkeypatch.setenv("LORALAB_SECRET", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named:
        named.bind("\0loralab-test")
        named.listen()
        port = server.getsockname()[1]
        code = attempt.format(path=str(marker), pid=os.getpid(), port=port)
        outcome = sandbox.run(f"{code}\nprint('REACHED')")
    assert "REACHED" not in outcome.stdout
    assert outcome.status == "failed"
    assert refused.replace("NotFound", "No such file") in outcome.reason


@needs_isolation
def test_signals_reach_nobody_outside() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    try:
        code = "import os, signal\nfor p in (0, -1, 1):\n    os.kill(p, signal.SIGTERM)"
        sandbox.run("import signal; signal.signal(15, signal.SIG_IGN)\n" + code)
        killed = sandbox.run("import os; os.kill(os.getppid(), 9); os.kill(1, 9); print('alive')")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert killed.stdout == "alive\n"
    assert not caught


FLOODS = {
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "timeout",
    ),
    "memory": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "failed memory"),
    "one allocation": ("x = bytearray(1 << 40)", "failed"),
    "memory of many": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n"
        "        x = b'x' * (60 << 20)\n        time.sleep(60)\ntime.sleep(60)",
        "memory",
    ),
    "sleep": ("import time\ntime.sleep(600)", "timeout"),
    "busy": ("while True: pass", "timeout"),
    "a long power": ("9**9**9", "timeout"),
    "endless output": ("while True: print('x' * 1000)", "output"),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    "ignores signals": (
        "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ntime.sleep(600)",
        "timeout",
    ),
    "a full disk": (
        "import os\nfor i in range(100):\n    open(f'f{i}', 'wb').write(b'x' * (1 << 24))",
        "failed",
    ),
    "a sparse file": ("open('f', 'wb').truncate(1 << 40)", "failed"),
    "many files": ("for i in range(10**6): open(f'f{i}', 'w').close()", "failed"),
    "open files": ("x = [open('/dev/null') for _ in range(10**6)]", "failed"),
    "threads": (
        "import threading, time\nx = [threading.Thread(target=time.sleep, args=(600,)) "
        "for _ in range(10**4)]\nfor t in x: t.start()",
        "failed",
    ),
    "waits for input": ("input()", "failed"),
}
"""Attacks on resources, and how each ends."""


@needs_isolation
@pytest.mark.parametrize("name", FLOODS)
def test_limits(name: str) -> None:
    code, status = FLOODS[name]
    # What is refused is so before any deadline, also on a machine that has much else to do.
    deadline = 1.0 if status == "timeout" else 30.0
    outcome = sandbox.run(code, timeout=deadline, memory_mb=256)
    assert outcome.status in status.split(), outcome.reason
    assert outcome.seconds < deadline + 5
    assert len(outcome.stdout) <= launch.OUTPUT_BYTES + 1
    assert not _left_behind()


LEAVERS = [
    "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    "import os, time\nif os.fork() == 0:\n    time.sleep(60)",
    "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        [os.close(h) for h in range(3)]\n        time.sleep(60)",
    "open('file', 'w').write('x' * 1000); import os; os.mkdir('folder'); os.chmod('folder', 0)",
]


@pytest.mark.parametrize("code", LEAVERS)
@pytest.mark.parametrize("isolate", [True, False])
def test_nothing_is_left(code: str, isolate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if isolate and sandbox.why_not_isolated():
        pytest.skip(sandbox.why_not_isolated())
    if not isolate:
        monkeypatch.setattr(launch, "why_not_isolated", lambda: "pretended")
    folder = Path(tempfile.gettempdir())
    before = set(folder.glob("loralab-*"))
    assert sandbox.run(code, unsafe=not isolate).status == "finished"
    assert not _left_behind()
    assert set(folder.glob("loralab-*")) == before


def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        f"from loralab.sandbox import launch; launch.why_not_isolated(); launch._BOOT += {MARK!r}\n"
        "launch.run('import time; time.sleep(60)', timeout=50, unsafe=True)"
    )
    starter = subprocess.Popen([sys.executable, "-c", script])
    try:
        _wait(lambda: len(_left_behind()) >= 3)
    finally:
        starter.kill()
        starter.wait()
    _wait(lambda: not _left_behind())
    assert not _left_behind()


def _left_behind() -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if MARK.encode() in line:
            found.append(folder.name)
    return found


def _wait(condition: object, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)
