"""Rows that teach the wrong thing: empty, repeated, cut off, or labelled otherwise elsewhere."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loralab.data.documents import normalised
from loralab.data.merge import deduplicate
from loralab.data.sources import Row

Kind = Literal["empty", "duplicate", "truncated", "mislabelled"]

ANSWERS = (
    "solution",
    "completion",
    "output",
    "answer",
    "response",
    "summary",
    "code",
    "canonical_solution",
)
ASKED = ("prompt", "instruction", "question", "input", "text", "sentence", "dialogue", "query")
LABELS = ("label", "labels", "class")

_SAME_LENGTH, _LIMIT = 3, 200
_USUAL, _ENDED = 0.9, 0.95
_ENOUGH = 20
_ENDS = re.compile(r"[.!?:;)\]}>\"'`*”’…\d]\s*$")
_UNFINISHED = re.compile(
    r"(?:,|\w ?[-–]|[(\[{]|\.\.\.|…|\b(?:and|or|the|a|an|of|to|with|because))\s*$"
)


@dataclass(frozen=True)
class Finding:
    """One fault of one row. reason: a line that says what is wrong, with what it was told by."""

    place: str
    kind: Kind
    reason: str


def lint(rows: Sequence[Row]) -> list[Finding]:
    """Faults of rows, in their order; a row may have several.

    empty: a column of text (or a message) without text, or a prompt that is its own answer.
    duplicate: the same as an earlier row, but for case and space.
    truncated: code that does not parse, a code block left open, prose that ends in a comma or an
        article, or without a mark where 95 of 100 have one, or that has the greatest length of all
        as two others have (a limit cut them).
    mislabelled: the same prompt with another label or short answer elsewhere; a label that occurs
        once where every other occurs often; chosen and rejected alike; an `answer` that the
        `output` does not hold.
    """
    found = [
        *_empty(rows),
        *(
            Finding(place, "duplicate", f"the same as {first}")
            for place, first in deduplicate(rows).dropped
        ),
        *_truncated(rows),
        *_mislabelled(rows),
    ]
    order = {row.place: number for number, row in enumerate(rows)}
    return sorted(found, key=lambda finding: order[finding.place])


def _empty(rows: Sequence[Row]) -> Iterator[Finding]:
    # Some columns are empty by design (Alpaca's `input`): those that most rows leave empty.
    filled = Counter(key for row in rows for key, value in row.data.items() if not _blank(value))
    needed = {key for key in ANSWERS if filled[key]} | {
        key for key, count in filled.items() if count > _USUAL * len(rows)
    }
    for row in rows:
        if not row.data or all(map(_blank, row.data.values())):
            yield Finding(row.place, "empty", "no column holds anything")
            continue
        for key in sorted(needed):
            if _blank(row.data.get(key)):
                yield Finding(row.place, "empty", f"`{key}` is empty")
        answer, asked = _first(row.data, ANSWERS), _first(row.data, ASKED)
        if answer and asked and normalised(answer) == normalised(asked):
            yield Finding(row.place, "empty", "the answer is the prompt again")


def _blank(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return "content" in value and _blank(value["content"])
    if isinstance(value, list):
        return not value or (isinstance(value[0], Mapping) and any(map(_blank, value)))
    return value is None


def _truncated(rows: Sequence[Row]) -> Iterator[Finding]:
    answers = {row.place: _answer(row.data) for row in rows}
    lengths = Counter(len(text) for text in {*answers.values()} if text)
    longest = max(lengths, default=0)
    cut = longest >= _LIMIT and lengths[longest] >= _SAME_LENGTH
    prose = [text for row in rows if (text := answers[row.place]) and _is_prose(row.data, text)]
    ended = sum(bool(_ENDS.search(text)) for text in prose)
    strict = len(prose) >= _ENOUGH and ended >= _ENDED * len(prose)
    for row in rows:
        text = answers[row.place]
        if not text or not text.strip():
            continue
        if text.count("```") % 2:
            yield Finding(row.place, "truncated", "a code block is left open")
        elif reason := _broken_code(row.data):
            yield Finding(row.place, "truncated", reason)
        elif cut and len(text) == longest:
            same = f"{lengths[longest]} answers have the greatest length of {longest} characters"
            yield Finding(row.place, "truncated", f"{same}: a limit may have cut them")
        elif _is_prose(row.data, text) and (
            _UNFINISHED.search(text) or (strict and not _ENDS.search(text))
        ):
            end = " ".join(text.split())[-30:]
            yield Finding(row.place, "truncated", f"it ends in the middle: {end!r}")


def _program(data: Mapping[str, Any]) -> str | None:
    """The Python program that a row holds, if it is of a form that holds one."""
    if isinstance(data.get("code"), str):
        return str(data["code"])
    solution = next((data[key] for key in ("solution", "canonical_solution") if key in data), None)
    prompt = data.get("prompt")
    if not isinstance(solution, str) or not isinstance(prompt, str):
        return None
    opened = re.search(r"^(?:def|class)\b", prompt, re.MULTILINE)
    return prompt + solution if opened else None


def _broken_code(data: Mapping[str, Any]) -> str:
    """Why a program is none, "" if it is one or the row holds no program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse((_program(data) or "").replace("\r\n", "\n"))
    except (SyntaxError, ValueError, RecursionError) as error:
        return f"not Python: {getattr(error, 'msg', error)}"
    return ""


def _is_prose(data: Mapping[str, Any], text: str) -> bool:
    return _program(data) is None and "def " not in text and len(text.split()) >= 8


def _mislabelled(rows: Sequence[Row]) -> Iterator[Finding]:
    by_prompt: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        label = _label(row.data)
        if label is not None:
            by_prompt[_question(row.data)].setdefault(label, row.place)
    counts = Counter(_label(row.data) for row in rows)
    usual = [count for label, count in counts.items() if label is not None]
    is_class = any(key in row.data for row in rows for key in LABELS)
    rare = is_class and len(rows) >= _ENOUGH and sum(count > 1 for count in usual) <= 20
    for row in rows:
        label = _label(row.data)
        if label is not None:
            others = {k: p for k, p in by_prompt[_question(row.data)].items() if k != label}
            if others:
                other, place = next(iter(others.items()))
                reason = f"labelled {label!r}, and the same prompt {other!r} at {place}"
                yield Finding(row.place, "mislabelled", reason)
            elif rare and counts[label] == 1:
                yield Finding(row.place, "mislabelled", f"the only row with the label {label!r}")
        chosen, rejected = row.data.get("chosen"), row.data.get("rejected")
        if chosen is not None and chosen == rejected:
            yield Finding(row.place, "mislabelled", "chosen and rejected are the same")
        answer, output = row.data.get("answer"), row.data.get("output")
        both = isinstance(answer, str) and isinstance(output, str) and answer.strip()
        if both and normalised(str(answer)) not in normalised(str(output)):
            reason = f"`output` does not hold the `answer` {answer!r}"
            yield Finding(row.place, "mislabelled", reason)


def _label(data: Mapping[str, Any]) -> str | None:
    """The class of a row, or a short answer that stands for one."""
    for key in LABELS:
        if isinstance(data.get(key), str | int | bool):
            return str(data[key]).strip()
    answer = _answer(data)
    if answer is None or len(answer.split()) > 3 or _program(data) is not None:
        return None
    return normalised(answer)


def _question(data: Mapping[str, Any]) -> str:
    turns = data.get("messages")
    if isinstance(turns, list):
        return normalised(str(turns[:-1]))
    return normalised("\n".join(str(data[key]) for key in ASKED if key in data))


def _answer(data: Mapping[str, Any]) -> str | None:
    turns = data.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
        content = turns[-1].get("content")
        return content if isinstance(content, str) else None
    return _first(data, ANSWERS)


def _first(data: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((data[key] for key in keys if isinstance(data.get(key), str)), None)
