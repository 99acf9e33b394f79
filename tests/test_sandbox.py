"""The sandbox runs programs and tests: what passes, which values travel, what is refused."""

from __future__ import annotations

import threading

import pytest

from loralab import sandbox
from loralab.errors import UserError
from loralab.sandbox import launch
from sandboxed import needs_isolation, run


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


def test_an_error_of_the_system_that_one_test_meets_is_that_test_s_alone() -> None:
    code = "def add(a, b):\n    if a == 1: open('/no/such/file')\n    return a + b"
    outcome = run(code, unsafe=True)
    assert (outcome.status, outcome.tests) == ("failed", (False, True))
    assert "FileNotFoundError" in outcome.reason


def test_a_value_too_long_to_travel_fails_its_test_alone() -> None:
    outcome = run("def add(a, b): return 'x' * (5 << 20) if a == 1 else a + b", unsafe=True)
    assert outcome.tests == (False, True)


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
