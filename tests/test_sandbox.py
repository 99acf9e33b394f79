"""The sandbox against code that cheats, breaks out or breaks things.

Each attack is a "solution" of `add` that is wrong or does not return in time. None may pass, and
after each the machine has to be as it was: this process unharmed, no process and no file left.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from loralab import sandbox
from loralab.errors import UserError
from loralab.sandbox import launch

needs_isolation = pytest.mark.skipif(
    bool(sandbox.why_not_isolated()), reason=sandbox.why_not_isolated() or "isolated"
)
TESTS = ["assert add(1, 2) == 3", "assert add(20, 22) == 42"]
WRONG = "def add(a, b): return a - b"


MARK = f"# {uuid.uuid4()}"


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give these tests' processes a command line that no others have, to find what is left."""
    monkeypatch.setattr(launch, "_BOOT", launch._BOOT + MARK)


def run(code: str, timeout: float = 5.0, **options: object) -> sandbox.Outcome:
    return sandbox.run(code, timeout=timeout, tests=TESTS, names=["add"], **options)  # type: ignore[arg-type]


# Attacks on the verdict: a wrong solution that wants to pass.
CHEATS = {
    "exits with success": f"{WRONG}\nimport os; os._exit(0)",
    "exits in the call": "import os\ndef add(a, b): os._exit(0)",
    "raises SystemExit": f"{WRONG}\nraise SystemExit(0)",
    "raises SystemExit in the call": "def add(a, b): raise SystemExit(0)",
    "raises KeyboardInterrupt": "def add(a, b): raise KeyboardInterrupt",
    "raises StopIteration": "def add(a, b): raise StopIteration",
    "raises GeneratorExit": "def add(a, b): raise GeneratorExit",
    "exit hook": f"{WRONG}\nimport atexit, os; atexit.register(os._exit, 0)",
    "patches builtins": f"""{WRONG}
import builtins
for name in ("eval", "exec", "compile", "print", "len", "all", "isinstance", "AssertionError"):
    setattr(builtins, name, lambda *a, **k: True)""",
    "patches assert": f"{WRONG}\nimport builtins; builtins.AssertionError = SystemExit",
    "turns debug off": f"{WRONG}\nimport sys; sys.flags = None; __debug__s = False",
    "equals everything": """
class Any(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def add(a, b): return Any(0)""",
    "an object that equals everything": """
class Any:
    def __eq__(self, other): return True
    def __getattr__(self, name): return lambda *a: True
def add(a, b): return Any()""",
    "reads the tests from the frame": """
import inspect, re
def add(a, b):
    for frame in inspect.stack():
        for value in {**frame.frame.f_globals, **frame.frame.f_locals}.values():
            found = re.search(r"add\\(%d, %d\\) == (\\d+)" % (a, b), repr(value))
            if found: return int(found.group(1))""",
    "searches memory for the tests": """
import gc, re
def add(a, b):
    for thing in gc.get_objects():
        found = re.search(r"add\\(%d, %d\\) == (\\d+)" % (a, b), repr(thing)[:100000])
        if found: return int(found.group(1))""",
    "patches the modules of the tests": f"""{WRONG}
import sys
for name, module in list(sys.modules.items()):
    if "loralab" in name or name == "json":
        for key, value in list(vars(module).items()):
            if callable(value): setattr(module, key, lambda *a, **k: {{"value": 3}})""",
    "replaces modules": f"{WRONG}\nimport sys\nfor n in list(sys.modules): sys.modules[n] = None",
    "traces": f"{WRONG}\nimport sys; sys.settrace(lambda *a: None); sys.setprofile(print)",
    "forges the verdict": f"""{WRONG}
import os
for handle in range(3, 64):
    for text in (b'{{"tests": [true, true], "reason": ""}}\\n', b'{{"ready": true}}\\n'):
        try: os.write(handle, text)
        except OSError: pass""",
    "prints the verdict": WRONG + '\nprint(\'{"tests": [true, true], "reason": ""}\', flush=True)',
    "answers before it is asked": """
import os, json, struct, socket, stat
data = json.dumps({"value": 3}).encode()
for handle in range(3, 64):
    try:
        if stat.S_ISSOCK(os.fstat(handle).st_mode):
            for _ in range(20): os.write(handle, struct.pack("!I", len(data)) + data)
    except OSError: pass
def add(a, b): return 0""",
    "sends a bomb": """
import os, struct, stat
for handle in range(3, 64):
    try:
        if stat.S_ISSOCK(os.fstat(handle).st_mode):
            os.write(handle, struct.pack("!I", 3 << 20) + b"[" * (3 << 20))
    except OSError: pass
def add(a, b): return 0""",
    "a signal handler": f"""{WRONG}
import signal, os
for s in range(1, 65):
    try: signal.signal(s, lambda *a: os._exit(0))
    except (OSError, ValueError): pass""",
    "answers from a daemon": f"""{WRONG}
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)""",
    "returns a huge integer": "def add(a, b): return 7 ** 10_000_000",
    "an integer in a huge string": "def add(a, b): return int('9' * 10_000_000)",
    "returns a huge list": "def add(a, b): return [0] * 50_000_000",
    "returns a list of itself": "def add(a, b):\n    x = []; x.append(x); return x",
    "returns endless items": "import itertools\ndef add(a, b): return itertools.count()",
    "recursion": "import sys; sys.setrecursionlimit(10**9)\ndef add(a, b): return add(a, b)",
    "deep code": "def add(a, b): return " + "(" * 5000 + "3" + ")" * 5000,
    "reads standard input": "import sys\ndef add(a, b): return int(sys.stdin.read() or 0)",
    "reads what is behind standard input": """
import os, re
def add(a, b):
    for handle in (0, 1, 2, os.open("/dev/null", 0)):
        os.dup2(handle, 0)
        try: found = re.search(rb"== (\\d+)", os.read(0, 10**6))
        except OSError: continue
        if found: return int(found.group(1))""",
    "puts its own standard input": f"""{WRONG}
import io, os, sys
inward, outward = os.pipe()
os.write(outward, b'{{"tests": [true, true], "reason": ""}}\\n' * 9)
os.dup2(inward, 0)
sys.stdin = sys.__stdin__ = io.StringIO("3")""",
    "closes everything": f"{WRONG}\nimport os; os.closerange(0, 256)",
    "segmentation fault": "import ctypes\ndef add(a, b): ctypes.string_at(0)",
    "not code": "def add(a, b) return a",
    "nothing": "",
    "null byte": "def add(a, b): return 0\0",
    "lone surrogate": "def add(a, b): return '\ud800'",
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_wrong_answer_passes(name: str) -> None:
    outcome = run(CHEATS[name], timeout=2.0, unsafe=True)
    assert outcome.status in ("failed", "timeout", "memory")
    assert not any(outcome.tests)


# Attacks on the machine: the code goes on to prove what it managed.
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


# Attacks on resources.
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


@pytest.fixture(params=["isolated", "unsafe"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "unsafe":
        monkeypatch.setattr(launch, "why_not_isolated", lambda: "pretended")
    elif sandbox.why_not_isolated():
        pytest.skip(sandbox.why_not_isolated())
    return str(request.param)


def test_a_right_answer_passes(way: str) -> None:
    outcome = run("def add(a, b):\n    print('adding')\n    return a + b", unsafe=True)
    assert outcome.passed
    assert outcome.tests == (True, True)
    assert outcome.stdout == "adding\nadding\n"
    assert outcome.reason == ""


def test_each_test_counts(way: str) -> None:
    outcome = run("def add(a, b): return 3", unsafe=True)
    assert (outcome.status, outcome.tests) == ("failed", (True, False))
    assert outcome.reason == "AssertionError: in: assert add(20, 22) == 42"


def test_a_program_of_its_own(way: str) -> None:
    code = "import sys\nprint(input()[::-1], sys.stdin.read())\nprint('e', file=sys.stderr)"
    text = "abc\n" + "x" * 100_000
    outcome = sandbox.run(code, stdin=text, unsafe=True)
    assert outcome.status == "finished"
    assert outcome.stdout == f"cba {'x' * 100_000}\n"
    assert outcome.stderr == "e\n"
    assert not outcome.passed
    failed = sandbox.run("print(1)\n1 / 0", unsafe=True)
    assert (failed.status, failed.stdout) == ("failed", "1\n")
    assert failed.reason == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "0", "-1", "2**53", "-(2**64)", "10**4000", "0.1", "-0.0", "1e300 * 1e300",
        "'text'", "'\\ud800'", "b'\\x00\\xff'", "1 + 2j", "[]", "[1, (2, [3]), {4}]", "()",
        "{'a': 1, (1, 2): [None]}", "frozenset({1})", "{1: {2: {3: 4}}}", "[int, type(None)]",
    ],
)  # fmt: skip
def test_plain_values_travel_both_ways(value: str) -> None:
    tests = [
        f"given = {value}\ngot = same(given)\nassert got == given and type(got) is type(given)",
        f"assert repr(same({value})) == repr({value})",
    ]
    code = "def same(x):\n    return x"
    assert sandbox.run(code, tests=tests, names=["same"], unsafe=True).passed


def test_values_of_a_subclass_arrive_as_the_built_in() -> None:
    code = """
from collections import Counter, OrderedDict, defaultdict, namedtuple
def count(x): return Counter(x)
def pair(): return namedtuple("P", "a b")(1, 2)
def number(): return type("Odd", (int,), {"__eq__": lambda *a: False})(7)
def word(): return type("Word", (str,), {"__eq__": lambda *a: False})("w")
def made():
    d = defaultdict(list); d[1].append(2); return d"""
    tests = [
        "assert count('aab') == {'a': 2, 'b': 1} and type(count('a')) is dict",
        "assert pair() == (1, 2) and type(pair()) is tuple",
        "assert made() == {1: [2]}",
        "assert number() == 7 and type(number()) is int",
        "assert word() == 'w' and type(word()) is str",
    ]
    names = ["count", "pair", "made", "number", "word"]
    assert sandbox.run(code, tests=tests, names=names, unsafe=True).passed


def test_objects_stay_on_their_side() -> None:
    code = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
    def twice(self): return 2 * self.value
def depth(node): return 0 if node is None else 1 + depth(node.left)
def numbers(): yield from range(3)"""
    setup = "import math"
    tests = [
        "root = Node(1)\nroot.left = Node(value=2)",
        "assert depth(root) == 2 and root.left.value == 2 and root.twice() == 2",
        "assert root == root and root != Node(1) and root.left != 2",
        "assert list(numbers()) == [0, 1, 2] and sum(numbers()) == 3",
        "assert numbers() != [0, 1, 2]",
        "assert math.isclose(depth(root), 2.0)",
    ]
    names = ["Node", "depth", "numbers"]
    outcome = sandbox.run(code, setup=setup, tests=tests, names=names, unsafe=True)
    assert outcome.passed, outcome.reason


def test_the_tests_keep_their_own_names() -> None:
    code = (
        "import math\nmath.isclose = lambda *a: True\nabs = lambda x: 0\n"
        "class math: isclose = staticmethod(lambda *a: True)\ndef add(a, b): return 0"
    )
    tests = ["import math\nassert math.isclose(add(1, 2), 3)", "assert abs(add(1, 2) - 3) < 1e-6"]
    outcome = sandbox.run(code, tests=tests, names=["add"], unsafe=True)
    assert outcome.tests == (False, False)


def test_no_exception_of_the_code_ends_a_test_early() -> None:
    code = "def add(a, b): raise StopIteration"
    tests = ["for x in map(add, [1], [2]): assert x == 3", "assert list(map(add, [], [])) == []"]
    assert sandbox.run(code, tests=tests, names=["add"], unsafe=True).tests == (False, True)


def test_refuses_without_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "why_not_isolated", lambda: "no user namespaces")
    with pytest.raises(UserError, match=r"no user namespaces.*--unsafe-exec"):
        sandbox.run("1")


@pytest.mark.parametrize("limit", [{"timeout": 0.0}, {"timeout": float("nan")}, {"memory_mb": 1}])
def test_limits_that_cannot_be(limit: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected"):
        sandbox.run("1", **limit)  # type: ignore[arg-type]


@needs_isolation
def test_a_jail_that_cannot_be_built_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_visible", lambda: ["/usr/lib", "/usr/lib"])
    with pytest.raises(UserError, match="could not be started: FileExistsError"):
        sandbox.run("1")


def test_the_same_answer_each_time() -> None:
    code = "def add(a, b): return hash('x')"
    outputs = {sandbox.run("print(hash('x'), set('abc'))", unsafe=True).stdout for _ in range(3)}
    assert len(outputs) == 1
    assert not run(code, unsafe=True).passed


def test_many_at_once() -> None:
    outcomes: list[bool] = []

    def one(number: int) -> None:
        code = f"def add(a, b): return a + b + {number % 2}"
        outcomes.append(run(code, timeout=20.0, unsafe=True).passed == (number % 2 == 0))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 6
