"""The sandbox against code that cheats: a wrong `add` that wants to pass, by any means."""

from __future__ import annotations

import pytest

from loralab import sandbox
from sandboxed import run

WRONG = "def add(a, b): return a - b"


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


def test_the_same_answer_each_time() -> None:
    code = "def add(a, b): return hash('x')"
    outputs = {sandbox.run("print(hash('x'), set('abc'))", unsafe=True).stdout for _ in range(3)}
    assert len(outputs) == 1
    assert not run(code, unsafe=True).passed
