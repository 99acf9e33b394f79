"""The untrusted side: runs the code, then answers calls to what it defined.

All here may be changed by the code it runs: `judge.py` believes nothing but plain values.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from loralab.sandbox import wire

_MOST_ITEMS = 100_000


def run_program(code: str) -> None:
    """Run code as a main program, to its end. Raises what it raises."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(code, "<code>", "exec", dont_inherit=True), module.__dict__)


def serve(code: str, handle: int) -> None:
    """Run the code, say how that went, and answer requests until the other side closes.

    A request names an operation and its operands: {"get": name}, {"call": [f, args, kwargs]},
    {"getattr": [x, name]}, {"setattr": [x, name, value]}, {"items": x}, {"truth": x}. The answer
    is {"value": ...} or {"raised": text}.
    """
    kept: list[Any] = []

    def refer(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def answer(operation: Any) -> Any:
        [(kind, content)] = operation.items()
        if kind == "get":
            return sys.modules["__main__"].__dict__[content]
        operands = wire.decode(content, kept.__getitem__)
        if kind == "call":
            function, arguments, keywords = operands
            return function(*arguments, **keywords)
        if kind == "getattr":
            return getattr(*operands)
        if kind == "setattr":
            return setattr(*operands)
        if kind == "truth":
            return bool(operands)
        items = []
        for item in operands:
            items.append(item)
            if len(items) > _MOST_ITEMS:
                raise ValueError(f"more than {_MOST_ITEMS} items")
        return items

    def attempt(action: Any, argument: Any) -> None:
        try:
            message = {"value": wire.encode(action(argument), refer)}
        except BaseException as error:
            message = {"raised": describe(error)}
        try:
            wire.send(handle, message)
        except OSError:  # the other side is gone
            raise
        except Exception as error:  # too long, or nothing that JSON holds
            wire.send(handle, {"raised": describe(error)})

    attempt(run_program, code)
    while True:
        try:
            request = wire.receive(handle)
        except wire.WireError:
            return
        attempt(answer, request)


def describe(error: BaseException) -> str:
    """One short line about an exception, whatever its own methods do."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = type(error).__name__
    return " ".join(text.split())[:500]
