"""The trusted side: runs the tests, and asks the other interpreter for what they call.

The untrusted code never shares an interpreter with the tests: it cannot read them, patch them or
write their verdict. What it returns arrives as plain values, and is compared here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loralab.sandbox import wire


class SolutionError(Exception):
    """The code under test raised.

    One class for whatever it raised: a StopIteration of its choice would end a test's loop early.
    """


class Remote:
    """Something that lives on the other side: a function, a class or an object of it.

    It equals itself alone. Calls, attributes, iteration and truth are asked of the other side.
    """

    __slots__ = ("_link", "_number")

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.ask("call", (self, list(args), kwargs))

    def __getattr__(self, name: str) -> Any:
        return self._link.ask("getattr", (self, name))

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("setattr", (self, name, value))

    def __iter__(self) -> Iterator[Any]:
        items = self._link.ask("items", self)
        if type(items) is not list:
            raise SolutionError("not iterable")
        return iter(items)

    def __bool__(self) -> bool:
        return self._link.ask("truth", self) is True


class Link:
    """Questions to the other side, one at a time."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def answer(self) -> Any:
        """The next answer. Raises SolutionError where the code raised, ended or babbled."""
        try:
            message = wire.receive(self._handle)
            if isinstance(message, dict) and "value" in message:
                return wire.decode(message["value"], lambda number: Remote(self, number))
        except (wire.WireError, RecursionError) as error:
            raise SolutionError(str(error)) from None
        raised = message.get("raised") if isinstance(message, dict) else None
        raise SolutionError(str(raised)[:500])

    def ask(self, kind: str, content: Any) -> Any:
        """The value of an operation that `solution.serve` knows."""
        encoded = content if kind == "get" else wire.encode(content, _number)
        try:
            wire.send(self._handle, {kind: encoded})
        except OSError:
            raise SolutionError("the program ended") from None
        return self.answer()


def _number(value: Any) -> int:
    if type(value) is not Remote:
        raise TypeError(f"a test cannot give the code a {type(value).__name__}")
    number: int = object.__getattribute__(value, "_number")
    return number


def judge(
    handle: int, setup: str, names: Sequence[str], tests: Sequence[str]
) -> tuple[list[bool], str]:
    """Which tests hold, and why the first that does not fails.

    setup: trusted code that the tests need, run before `names`.
    names: what the tests take from the code under test; every other name is their own.
    """
    link = Link(handle)
    space: dict[str, Any] = {"__name__": "tests"}
    try:
        link.answer()
        exec(compile(setup, "<setup>", "exec", dont_inherit=True), space)
        for name in names:
            space[name] = link.ask("get", name)
    except BaseException as error:
        return [False] * len(tests), _why(error)
    held, reason = [], ""
    for test in tests:
        try:
            exec(compile(test, "<test>", "exec", dont_inherit=True), space)
            held.append(True)
        except BaseException as error:
            held.append(False)
            reason = reason or f"{_why(error)} in: {' '.join(test.split())[:200]}"
    return held, reason


def _why(error: BaseException) -> str:
    text = str(error) if isinstance(error, SolutionError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]
