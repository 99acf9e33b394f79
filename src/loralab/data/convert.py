"""HumanEval and MBPP as rows of `id`, `prompt` and `solution`.

The prompt is what comes before the function, its signature and its docstring; the solution is the
indented body. Prompt + solution is the program: `tests/test_data_tools.py` runs it.
"""

from __future__ import annotations

import ast
import tokenize
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from loralab.data.sources import Row
from loralab.errors import UserError

# MBPP's paper (arXiv:2108.07732) splits by task id.
_MBPP_SPLITS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


@dataclass(frozen=True)
class Converted:
    """rows: in the new form. skipped: place and reason of those that cannot take it."""

    rows: tuple[dict[str, str], ...]
    skipped: tuple[tuple[str, str], ...]


def convert(rows: Iterable[Row], split: str = "all") -> Converted:
    """Rows of HumanEval or MBPP (full or sanitized), told apart by their columns.

    split: "all", "train", "test", and of MBPP "validation" and "prompt". HumanEval is a test set.

    Raises:
        UserError: a row of neither, or no row of this split.
    """
    made: list[dict[str, str]] = []
    skipped = []
    for row in rows:
        kind = _kind(row)
        if split not in ("all", _split(row, kind)):
            continue
        try:
            made.append(_humaneval(row) if kind == "humaneval" else _mbpp(row))
        except _OtherForm as error:
            skipped.append((row.place, str(error)))
    if not made:
        raise UserError(
            f"convert: no row of split {split!r}; HumanEval has test alone, MBPP "
            f"{', '.join(_MBPP_SPLITS)}"
        )
    return Converted(tuple(made), tuple(skipped))


class _OtherForm(Exception):
    """A row that cannot be written as an opened function and its body."""


def _kind(row: Row) -> str:
    if {"prompt", "canonical_solution", "entry_point"} <= row.data.keys():
        return "humaneval"
    if {"code", "test_list"} <= row.data.keys() and row.data.keys() & {"text", "prompt"}:
        return "mbpp"
    raise UserError(
        f"{row.place}: neither HumanEval (prompt, canonical_solution, entry_point) nor MBPP "
        f"(text, code, test_list): its columns are {', '.join(sorted(row.data))}"
    )


def _split(row: Row, kind: str) -> str:
    if kind == "humaneval":
        return "test"
    number = row.data.get("task_id")
    return next((name for name, ids in _MBPP_SPLITS.items() if number in ids), "")


def _humaneval(row: Row) -> dict[str, str]:
    prompt, solution = row.data["prompt"], row.data["canonical_solution"]
    return {"id": str(row.data.get("task_id")), "prompt": prompt, "solution": solution}


def _mbpp(row: Row) -> dict[str, str]:
    text = row.data["text" if "text" in row.data else "prompt"].strip()
    code = row.data["code"].replace("\r\n", "\n").strip() + "\n"
    prompt, solution = open_function(code, text, row.data["test_list"])
    return {"id": f"MBPP/{row.data.get('task_id')}", "prompt": prompt, "solution": solution}


def open_function(code: str, text: str, tests: list[str]) -> tuple[str, str]:
    """A program as the opened function that tests call, with `text` as its docstring, and a body.

    Everything else that the program has stands before the function.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree, called = ast.parse(code), _names(ast.parse("\n".join(tests)))
    except SyntaxError as error:
        raise _OtherForm(f"not Python: {error.msg}") from error
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in called]
    if not found:
        raise _OtherForm("its tests call no function that it defines")
    function = found[-1]
    for node in tree.body[tree.body.index(function) + 1 :]:
        definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if not definition and function.name in _names(node):
            raise _OtherForm("behind the function are statements that use it")
    lines = code.splitlines(keepends=True)
    first = min([function.lineno, *(d.lineno for d in function.decorator_list)]) - 1
    header_end = _end_of_header(lines, function.lineno - 1)
    start, body = header_end, function.body
    if body[0].lineno <= start:
        raise _OtherForm("its function stands on one line")
    if ast.get_docstring(function) is not None:
        start = body[0].end_lineno or start
        body = body[1:]
    if not body or body[0].lineno <= start:
        raise _OtherForm("its function has no body")
    indent = lines[body[0].lineno - 1][: body[0].col_offset]
    behind = "".join(lines[function.end_lineno :]).strip("\n")
    above = "".join(lines[:first]) + (f"{behind}\n\n" if behind else "")
    header = "".join(lines[first:header_end])
    prompt = f"{above}{header}{indent}{_docstring(text, indent)}\n"
    solution = "".join(lines[start : function.end_lineno])
    return prompt, solution if solution.endswith("\n") else f"{solution}\n"


def _end_of_header(lines: list[str], first: int) -> int:
    """How many lines there are up to the end of the signature that begins at `first`."""
    text = iter(lines[first:])
    for token in tokenize.generate_tokens(lambda: next(text, "")):
        if token.type == tokenize.NEWLINE:
            return first + token.end[0]
    return len(lines)


def _docstring(text: str, indent: str) -> str:
    escaped = text.replace("\\", "\\\\")
    if '"""' in text or text.endswith('"'):
        escaped = escaped.replace('"', '\\"')
    return f'"""{escaped.replace(chr(10), chr(10) + indent)}"""'


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
