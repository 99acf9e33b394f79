"""What is wrong with a config, in one line: the key, the value, what was expected."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Union

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

EXPECTED = {
    "model_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text (in quotes if it looks like a number)",
    "bool_type": "true or false",
}
"""Pydantic's words for types, put as YAML has them."""


def explained(
    error: ValidationError, schema: type[BaseModel], source: str, overridden: Sequence[str] = ()
) -> str:
    """One line for a failed check. `overridden` are the key paths that a command line set."""
    known = list(_paths(schema))
    details = {_path(d, known): d for d in reversed(error.errors(include_url=False))}
    # A misspelt key also leaves its right spelling missing: the misspelling is the news.
    path = min(reversed(details), key=lambda p: details[p]["type"] != "extra_forbidden")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return _explain(path, details[path], known, source, overridden) + more


def _path(detail: ErrorDetails, known: Sequence[str]) -> str:
    """The key path a user wrote. Pydantic's location also names branches of unions and indices."""
    location = [str(part) for part in detail["loc"]]
    if detail["type"] in ("extra_forbidden", "missing") or location[:2] == ["task", "options"]:
        return ".".join(location)
    while len(location) > 1 and ".".join(location) not in known:
        location.pop()
    return ".".join(location)


def _explain(
    path: str, detail: ErrorDetails, known: Sequence[str], source: str, overridden: Sequence[str]
) -> str:
    kind, value = detail["type"], shown(detail["input"])
    whole_section = kind == "value_error"
    if any(
        path == o or path.startswith(o + ".") or (whole_section and o.startswith(path + "."))
        for o in overridden
    ):
        source = "command line"
    if kind == "extra_forbidden":
        near = _nearest(path, known)
        hint = f"did you mean {near}?" if near else _siblings(path, known)
        return f"{source}: unknown key {path} (value {value}); {hint}"
    if kind == "missing":
        return f"{source}: {path} is missing; it has no default"
    if whole_section:
        where = f"{source}: {path}" if path else source
        return f"{where}: expected {detail['ctx']['error']}"
    if path == "adapter.target_modules":
        expected = '"all-linear" or a list of module names'
    else:
        expected = EXPECTED.get(kind) or detail["msg"].removeprefix("Input should be ")
    return f"{source}: {path} is {value}; expected {expected}"


def _nearest(path: str, known: Sequence[str]) -> str | None:
    """The known key a user most likely meant: a near sibling, else the same name elsewhere."""
    parent, _, name = path.rpartition(".")
    siblings = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == parent}
    near = get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return siblings[near[0]]
    names = {p.rpartition(".")[2]: p for p in reversed(known)}
    near = get_close_matches(name, names, n=1, cutoff=0.75)
    return names[near[0]] if near else None


def _siblings(path: str, known: Sequence[str]) -> str:
    parent = path.rpartition(".")[0]
    names = [p.rpartition(".")[2] for p in known if p.rpartition(".")[0] == parent]
    return f"known keys here: {', '.join(names)}"


def _paths(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key path of a schema, outermost first."""
    sections = []
    for name, field in schema.model_fields.items():
        yield prefix + name
        sections += [(name, section) for section in _sections(field.annotation)]
    for name, section in sections:
        yield from _paths(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (Union, types.UnionType):
        for branch in typing.get_args(annotation):
            yield from _sections(branch)


def shown(value: Any) -> str:
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
