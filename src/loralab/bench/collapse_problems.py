"""HumanEval and MBPP as functions to finish, and how much of an answer is one."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from loralab import sandbox
from loralab.data.convert import convert
from loralab.data.sources import Row, read_rows
from loralab.health.text import newline_share
from loralab.tasks.code import MBPP, HumanEval, humaneval_example, mbpp_example
from loralab.tasks.programs import continued_function

_OPENED = re.compile(r"^(?:async )?def (\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """prompt: a function's signature and docstring. solution: its body. row: as it was published,
    with its tests."""

    prompt: str
    solution: str
    row: Row

    @cached_property
    def name(self) -> str:
        """Of the function that the prompt opens."""
        return str(_OPENED.findall(self.prompt)[-1])

    def program(self, completion: str) -> str:
        """Prompt and completion, cut where the function ends."""
        return continued_function(self.prompt, completion, self.name)

    def written(self, completion: str) -> bool:
        """Whether there is a function: Python, with a statement behind the docstring.

        Newlines alone make a function too, of a docstring and nothing else.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(self.program(completion))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
        bodies = [
            node.body
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == self.name
        ]
        return bool(bodies) and not all(map(_says_nothing, bodies[-1]))

    def passes(self, completion: str) -> bool:
        """Whether it holds every test, in the sandbox.

        Raises:
            UserError: this machine cannot isolate code.
        """
        if "entry_point" in self.row.data:
            return HumanEval().score(humaneval_example(self.row), completion).correct is True
        return MBPP().score(mbpp_example(self.row), self.program(completion)).correct is True


def problems_of(files: Sequence[str]) -> list[Problem]:
    """The problems of files as they are published, in their order; those that cannot be parted
    into an opened function and its body are left out."""
    made = []
    for file in files:
        rows = read_rows(file)
        names = {_id(row.data): row for row in rows}
        made += [
            Problem(pair["prompt"], pair["solution"], names[pair["id"]])
            for pair in convert(rows).rows
        ]
    return made


def score(problems: Sequence[Problem], completions: Sequence[str], tests: bool) -> dict[str, Any]:
    """problems: how many; written, passed: of these (passed None without tests); newlines: share of
    a completion's characters, mean."""
    pairs = list(zip(problems, completions, strict=True))
    written = [(problem, text) for problem, text in pairs if problem.written(text)]
    passed = None
    if tests and not sandbox.why_not_isolated():
        passed = sum(problem.passes(text) for problem, text in written)
    return {
        "problems": len(pairs),
        "written": len(written),
        "passed": passed,
        "newlines": fmean(newline_share(text) for _, text in pairs),
    }


def _id(row: Mapping[str, Any]) -> str:
    number = row.get("task_id")
    return str(number) if "entry_point" in row else f"MBPP/{number}"


def _says_nothing(statement: ast.stmt) -> bool:
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant or isinstance(statement, ast.Pass)
