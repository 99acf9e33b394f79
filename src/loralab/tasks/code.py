"""HumanEval (arXiv:2107.03374) and MBPP (arXiv:2108.07732): programs, judged by their tests.

The reward is 1 where every test holds and 0 otherwise; pass@k comes from `tasks.metrics`. Programs
run in `loralab.sandbox`, apart from their tests.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

from loralab import sandbox
from loralab.data.sources import Row, data_files, read_rows
from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split
from loralab.tasks.programs import continued_function, whole_program
from loralab.tasks.splits import rows_of_split, text_field

Style = Literal["plain", "chat"]

_SHOTS = range(1, 11)
_TRAIN = range(601, 975)
_HELD_OUT = {"test": range(11, 511), "validation": range(511, 601)}


@dataclass(frozen=True)
class _Judge:
    """Runs programs against tests within limits, or refuses where it cannot do so safely."""

    task: str
    timeout: float
    memory_mb: int
    unsafe: bool

    def __post_init__(self) -> None:
        missing = sandbox.why_not_isolated()
        if missing and not self.unsafe:
            raise UserError(
                f"{self.task}: this machine cannot isolate generated code ({missing}); see "
                "docs/sandbox.md, or accept the risk with --unsafe-exec"
            )

    def score(self, program: str, setup: str, names: Sequence[str], tests: Sequence[str]) -> Score:
        outcome = sandbox.run(
            program,
            timeout=self.timeout,
            memory_mb=self.memory_mb,
            setup=setup,
            names=names,
            tests=tests,
            unsafe=self.unsafe,
        )
        held = sum(outcome.tests) / len(tests)
        stopped = outcome.status in ("timeout", "memory", "output")
        parts = {"passed": float(outcome.passed), "tests": held, "stopped": float(stopped)}
        return Score(float(outcome.passed), outcome.passed, parts)


class HumanEval:
    """The 164 functions of HumanEval: a test set, so its train split is empty.

    path: a file or folder of its rows, or a hub name.
    style: "plain" is the signature and docstring, to be continued; "chat" asks for the function.
    timeout: seconds a completion may take by the clock, its tests included; a gold solution of
        MBPP takes 2 on an idle core, so raise it on a machine that is busy. memory_mb: MiB it may
        use.
    unsafe_exec: run it without isolation on a machine that has none.
    """

    name = "humaneval"
    reward_floor = 0.0
    full_marks = 1.0

    def __init__(
        self,
        *,
        path: str = "openai/openai_humaneval",
        style: Style = "plain",
        timeout: float = 10.0,
        memory_mb: int = 512,
        unsafe_exec: bool = False,
        examples: int | None = None,
    ) -> None:
        _check_count(self.name, examples)
        self.path = path
        self.style = style
        self.count = examples
        self._judge = _Judge(self.name, timeout, memory_mb, unsafe_exec)

    def examples(self, split: Split) -> Sequence[Example]:
        """Data holds `prompt`, `solution`, `entry_point` and `test`."""
        return self._rows[: self.count] if split == "test" else []

    def prompt(self, example: Example) -> Prompt:
        """The opened function, as it stands or as a request."""
        opened = str(example.data["prompt"])
        if self.style == "plain":
            return opened
        request = "Complete this Python function. Answer with the whole function in a code block."
        return [Message(role="user", content=f"{request}\n\n```python\n{opened.rstrip()}\n```")]

    def score(self, example: Example, completion: str) -> Score:
        """1 if the function passes its tests. parts: `stopped` is 1 at a limit of the sandbox."""
        data = example.data
        name = str(data["entry_point"])
        program = continued_function(data["prompt"], completion, name)
        # The prompt's helpers, which some tests call, are the tests' own here.
        setup = f"{data['prompt']}\n    pass\n\n{data['test']}"
        return self._judge.score(program, setup, [name], [f"check({name})"])

    def gold(self, example: Example) -> str | None:
        """The canonical solution."""
        solution = str(example.data["solution"])
        if self.style == "plain":
            return solution
        return f"```python\n{example.data['prompt']}{solution.rstrip()}\n```"

    @cached_property
    def _rows(self) -> list[Example]:
        local = Path(self.path).expanduser()
        rows = read_rows(local) if local.exists() else rows_of_split(self.path, "test")
        return [humaneval_example(row) for row in rows]


class MBPP:
    """The problems of MBPP, split by task id as its paper does.

    path: a file of its rows, a folder that holds one, or a hub name.
    subset: "full" is all 974 rows, "sanitized" the 427 that people went over.
    held_out: what the test split is: ids 11 to 510 ("test") or 511 to 600 ("validation").
    style: "plain" is text to be continued behind [BEGIN], "chat" asks for the function. Both show
        the tests, as the paper does.
    shots: solved problems (of ids 1 to 10) in each prompt; the paper has 3, ids 2 to 4.
    timeout, memory_mb, unsafe_exec: as in HumanEval.
    """

    name = "mbpp"
    reward_floor = 0.0
    full_marks = 1.0

    def __init__(
        self,
        *,
        path: str = "google-research-datasets/mbpp",
        subset: Literal["full", "sanitized"] = "full",
        held_out: Literal["test", "validation"] = "test",
        style: Style = "plain",
        shots: int = 0,
        timeout: float = 10.0,
        memory_mb: int = 512,
        unsafe_exec: bool = False,
        examples: int | None = None,
    ) -> None:
        _check_count(self.name, examples)
        if not 0 <= shots <= 7:
            raise UserError(f"mbpp: shots is {shots}, expected 0 to 7")
        self.path = path
        self.subset = subset
        self.held_out = held_out
        self.style = style
        self.shots = shots
        self.count = examples
        self._judge = _Judge(self.name, timeout, memory_mb, unsafe_exec)

    def examples(self, split: Split) -> Sequence[Example]:
        """Data holds `text`, `solution`, `imports`, `names`, `given` and `tests`."""
        wanted = _TRAIN if split == "train" else _HELD_OUT[self.held_out]
        if self._local is None:
            on_hub = split if split == "train" else cast("Split", self.held_out)
            rows = rows_of_split(self.path, on_hub, self.subset)
            return [mbpp_example(row) for row in rows][: self.count]
        return self._between(wanted)[: self.count]

    def prompt(self, example: Example) -> Prompt:
        """The problem and its tests, behind the shots."""
        shown = [self._posed(shot) + self._solved(shot) for shot in self._shots]
        if self.style == "plain":
            return "".join(f"{text}\n\n" for text in shown) + self._posed(example)
        request = "Write the Python function. Answer with its code in a code block."
        return [Message(role="user", content="\n\n".join([request, *shown, self._posed(example)]))]

    def score(self, example: Example, completion: str) -> Score:
        """1 if every test holds. parts: `tests` is the share that does."""
        data = example.data
        program = whole_program(completion, data["names"][0])
        first, *others = data["tests"]
        # What the tests are given may be made of the program's own classes (a tree of its nodes).
        tests = [f"{data['given']}\n{first}", *others]
        return self._judge.score(program, data["imports"], data["names"], tests)

    def gold(self, example: Example) -> str | None:
        """The row's code."""
        return self._solved(example)

    def _posed(self, example: Example) -> str:
        tests = "\n".join(example.data["tests"])
        posed = f"{example.data['text']} Your code should pass these tests:\n\n{tests}\n"
        if self.style == "chat":
            return posed
        return f"You are an expert Python programmer, and here is your task: {posed}[BEGIN]\n"

    def _solved(self, example: Example) -> str:
        code = str(example.data["solution"])
        return f"{code}\n[DONE]" if self.style == "plain" else f"```python\n{code}\n```"

    @cached_property
    def _shots(self) -> list[Example]:
        if not self.shots:
            return []
        if self._local is None:
            raise UserError("mbpp: shots need its file; give a folder that holds it as path")
        # The paper's three first: ids 2, 3 and 4.
        found = sorted(self._between(_SHOTS), key=lambda e: (int(e.id) - 2) % 10)
        if len(found) < self.shots:
            raise UserError(f"mbpp: {self.path} has {len(found)} rows of ids 1 to 10 for shots")
        return found[: self.shots]

    @cached_property
    def _local(self) -> list[Example] | None:
        path = Path(self.path).expanduser()
        if not path.exists():
            return None
        clean = self.subset == "sanitized"
        rows = _local_rows(path, lambda name: ("sanitized" in name) == clean)
        return [mbpp_example(row) for row in rows]

    def _between(self, ids: range) -> list[Example]:
        return [example for example in self._local or [] if int(example.id) in ids]


def humaneval_example(row: Row) -> Example:
    """A row of HumanEval. Raises UserError with its place where a column is missing."""
    columns = {"prompt": "prompt", "solution": "canonical_solution", "test": "test"}
    data = {ours: text_field(row, theirs) for ours, theirs in columns.items()}
    return Example(
        text_field(row, "task_id"), {**data, "entry_point": text_field(row, "entry_point")}
    )


def mbpp_example(row: Row) -> Example:
    """A row of MBPP, full or sanitized; `names` are those its tests take from its code.

    Raises:
        UserError: a column is missing, or its tests take nothing from its code; with its place.
    """
    code = text_field(row, "code").replace("\r\n", "\n").strip()
    tests = row.data.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        raise UserError(f"{row.place}: `test_list` is {tests!r}, expected a list of statements")
    imports = row.data.get("test_imports") or []
    given = str(row.data.get("test_setup_code") or "").replace("\r\n", "\n").strip()
    text = text_field(row, "text" if "text" in row.data else "prompt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # regular expressions of old rows, not spelled raw
            names, imports_too = _taken(code, [given, *tests]), _imports(code)
    except SyntaxError as error:
        raise UserError(f"{row.place}: its code or tests are not Python: {error.msg}") from error
    if not names:
        raise UserError(f"{row.place}: its tests use nothing that its `code` defines")
    return Example(
        str(row.data.get("task_id")),
        {
            "text": text.strip(),
            "solution": code,
            "imports": "\n".join([*map(str, imports), *imports_too]),
            "names": names,
            "given": given,
            "tests": tests,
        },
    )


def _taken(code: str, tests: Sequence[str]) -> list[str]:
    """Names that the code's top level defines and the tests use, functions first."""
    defined: dict[str, int] = {}
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            defined[statement.name] = 0
        elif isinstance(statement, ast.ClassDef):
            defined[statement.name] = 1
        elif isinstance(statement, ast.Assign):
            defined |= {t.id: 2 for t in statement.targets if isinstance(t, ast.Name)}
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    return sorted(used & defined.keys(), key=lambda name: (defined[name], name))


def _imports(code: str) -> list[str]:
    """Imports of the gold code: a few tests count on them (`sys.getsizeof`)."""
    return [
        ast.unparse(statement)
        for statement in ast.parse(code).body
        if isinstance(statement, ast.Import | ast.ImportFrom)
    ]


def _local_rows(path: Path, wanted: Callable[[str], bool]) -> list[Row]:
    """Rows of a file, or of those files of a folder whose names are wanted."""
    files = data_files(path)
    chosen = [file for file in files if wanted(file.name.lower())] if path.is_dir() else files
    if not chosen:
        raise UserError(f"{path} holds no file of this subset: {', '.join(f.name for f in files)}")
    return [row for file in chosen for row in read_rows(file)]


def _check_count(task: str, examples: int | None) -> None:
    if examples is not None and examples < 1:
        raise UserError(f"{task}: examples is {examples}, expected 1 or more")
