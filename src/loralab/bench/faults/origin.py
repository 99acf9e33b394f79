"""What a record comes from: the plan of its run, and the code that measured it.

A record of another plan, or that other code measured, is no record of the run that is asked for.
Code that only judges (rules, limits, the page) is not asked: it may change, and the same records
are judged again.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from hashlib import blake2b
from inspect import getclosurevars, isfunction, ismodule
from pathlib import Path
from typing import Any

from loralab.bench.faults.plan import Plan

_PACKAGE = Path(__file__).parents[2]
_JUDGES = (
    *("health/causes.py", "health/condition.py", "health/rule.py", "health/rules*.py"),
    *("health/ruled_out.py", "health/thresholds.py", "health/tables.py", "health/telling.py"),
    *("health/trackers.py", "bench/faults/__init__.py", "bench/faults/command.py"),
    *("bench/faults/items.py", "bench/faults/judgement.py", "bench/faults/left_out.py"),
    *("bench/faults/limits.py", "bench/faults/margins.py", "bench/faults/origin.py"),
    *("bench/faults/page.py", "bench/faults/peers.py", "bench/faults/reached.py"),
    *("bench/faults/sections.py", "bench/faults/statistics.py"),
)
"""Of `health` and of this benchmark, what takes no part in a run's numbers."""


def origin(plan: Plan, words: str, files: Mapping[str, str]) -> dict[str, Any]:
    """As JSON keeps it. words: the part that the questions are of. files: their `code`."""
    return {"words": words, "plan": described(plan), "code": dict(files)}


def differences(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a record's origin is not as wanted: "plan", "words", names of files."""
    kept = record.get("origin", {})
    names = [name for name in ("plan", "words") if kept.get(name) != wanted[name]]
    theirs, ours = kept.get("code", {}), wanted["code"]
    names += [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    return tuple(names)


def code(package: Path = _PACKAGE) -> dict[str, str]:
    """A digest of each file that measures. Comments and layout do not count."""
    found = {}
    for folder in ("bench/faults", "health"):
        for file in sorted((package / folder).rglob("*")):
            name = file.relative_to(package).as_posix()
            judges = any(file.match(pattern) for pattern in _JUDGES)
            if file.suffix in (".py", ".json") and not judges:
                text = file.read_text(encoding="utf-8")
                meant = ast.dump(ast.parse(text)) if file.suffix == ".py" else text
                found[name] = blake2b(meant.encode(), digest_size=6).hexdigest()
    return found


def described(value: Any) -> Any:
    """A plan and what is in it as plain data: a function is its name and what it has closed over;
    what the function does is code."""
    if isinstance(value, Plan):
        return {one.name: described(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, partial):
        return [described(value.func), described(value.args), described(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [described(one) for one in value]
    if ismodule(value):
        return value.__name__
    if isfunction(value):
        held = getclosurevars(value).nonlocals
        # A function may hold the plan that holds it.
        kept = {k: described(v) for k, v in held.items() if not isinstance(v, Plan)}
        return {"does": f"{value.__module__}.{value.__qualname__}", **kept}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a plan holds {value!r}, which is no plain data")
