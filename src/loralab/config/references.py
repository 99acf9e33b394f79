"""`stages.NAME.OUTPUT`: what an earlier stage of a pipeline leaves, where a value would stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from loralab.errors import UserError

STAGES, INPUTS = "stages", "inputs"

_WRITTEN = re.compile(rf"({STAGES}|{INPUTS})\.\S*")
_READS = {
    "model": "model",
    "reference": "model",
    "teacher": "model",
    "adapter": "adapter",
    "generator": "adapter",
}
"""Keys that take one output alone, so that the wrong one is named before anything runs."""


@dataclass(frozen=True)
class Reference:
    """key: the dotted path of the value that stands for it."""

    key: str
    stage: str
    output: str

    def __str__(self) -> str:
        return f"{STAGES}.{self.stage}.{self.output}"


def references(values: Mapping[str, Any], where: str) -> list[Reference]:
    """Every reference to a stage in a stage's values, in their order.

    Raises:
        UserError: one that is not of the form; `where` names the stage.
    """
    found = []
    for key, text in texts(values):
        if not text.startswith(f"{STAGES}.") or _WRITTEN.fullmatch(text) is None:
            continue
        parts = text.split(".")
        if len(parts) != 3 or not all(parts):
            raise UserError(
                f"{where}: {key} is {text!r}; expected {STAGES}.NAME.OUTPUT, as in "
                f"{STAGES}.sft.model"
            )
        found.append(Reference(key, parts[1], parts[2]))
    return found


def check(
    reference: Reference, where: str, earlier: Mapping[str, frozenset[str]], later: frozenset[str]
) -> None:
    """Whether a stage may read this.

    earlier: what each stage before it leaves. later: the stage itself and those behind it.

    Raises:
        UserError: no such stage or output, or a stage that comes later.
    """
    name, said = reference.stage, f"{where}: {reference.key} is {str(reference)!r}"
    if name in later:
        raise UserError(f"{said}; a stage reads earlier ones alone: put {name} before this one")
    if name not in earlier:
        near = get_close_matches(name, earlier, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"{said}; there is no stage {name!r} before it{hint}; known: "
            f"{', '.join(earlier) or 'none'}"
        )
    left = earlier[name]
    if reference.output not in left:
        raise UserError(f"{said}; stage {name} leaves {_listed(left)}")
    wanted = _wanted(reference.key)
    if wanted is not None and reference.output != wanted:
        mend = f"expected {STAGES}.{name}.{wanted}" if wanted in left else f"it takes a {wanted}"
        raise UserError(f"{said}; {mend}")


def with_inputs(values: Any, inputs: Mapping[str, str], where: str) -> Any:
    """A copy of a stage's values with every `inputs.NAME` replaced by that input.

    Raises:
        UserError: there is no input of that name.
    """

    def one(key: str, text: str) -> str:
        if not text.startswith(f"{INPUTS}.") or _WRITTEN.fullmatch(text) is None:
            return text
        name = text.removeprefix(f"{INPUTS}.")
        if name not in inputs:
            raise UserError(
                f"{where}: {key} is {text!r}; the pipeline's inputs are "
                f"{', '.join(inputs) or 'none'}"
            )
        return inputs[name]

    return replaced(values, one)


def replaced(values: Any, one: Callable[[str, str], str], prefix: str = "") -> Any:
    """A copy of nested values, each text replaced by `one` of its dotted key and itself."""
    if isinstance(values, str):
        return one(prefix, values)
    if isinstance(values, Mapping):
        return {k: replaced(v, one, f"{prefix}.{k}".lstrip(".")) for k, v in values.items()}
    if isinstance(values, list | tuple):
        return [replaced(v, one, f"{prefix}.{i}".lstrip(".")) for i, v in enumerate(values)]
    return values


def texts(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested values, with its dotted key."""
    if isinstance(values, str):
        yield prefix, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from texts(value, f"{prefix}.{key}".lstrip("."))
    elif isinstance(values, list | tuple):
        for place, value in enumerate(values):
            yield from texts(value, f"{prefix}.{place}".lstrip("."))


def _wanted(key: str) -> str | None:
    if key.endswith("init.options.path"):
        return "adapter"
    if key in ("data.path", "data.test_path"):
        return "data"
    return _READS.get(key.rpartition(".")[2])


def _listed(outputs: frozenset[str]) -> str:
    return " and ".join(sorted(outputs)) or "nothing that another stage can read"
