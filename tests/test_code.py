"""HumanEval, MBPP and pass@k: agreement with plain execution, and nothing else scores."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from loralab import sandbox, tasks
from loralab.errors import UserError
from loralab.tasks import code
from loralab.tasks.base import Example
from loralab.tasks.check import check
from loralab.tasks.code import MBPP, HumanEval
from loralab.tasks.metrics import mean_pass_at_k, pass_at_k
from loralab.tasks.programs import continued_function, whole_program
from mutations import mutants

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")

PROMPT = '''import math

def half(x):
    return x / 2

def twice(x: int) -> int:
    """Twice x.
    >>> twice(2)
    4
    """
'''
HUMANEVAL_ROW = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert all(half(candidate(n)) == n for n in range(5))\n",
}
MBPP_ROWS = [
    {
        "text": "Write a function to add.",
        "code": "ONE = 1\r\ndef add(a, b):\r\n    return a + b",
        "task_id": number,
        "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(0, 0) == 0"],
        "challenge_test_list": [],
    }
    for number in (11, 510, 511, 600, 601, 974)
]
SHOTS = [
    {
        **MBPP_ROWS[0], "task_id": number, "code": f"TWO = 2\ndef shot{number}(): return TWO",
        "test_list": [f"assert shot{number}() == 2"],
    }
    for number in (1, 2, 3)
]  # fmt: skip


@pytest.fixture
def humaneval(tmp_path: Path) -> HumanEval:
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(HUMANEVAL_ROW) + "\n")
    return HumanEval(path=str(tmp_path), unsafe_exec=True)


@pytest.fixture
def mbpp(tmp_path: Path) -> Path:
    (tmp_path / "mbpp.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*SHOTS, *MBPP_ROWS])
    )
    clean = {
        "task_id": 11, "prompt": "Add two.", "code": "def plus(a, b): return math.floor(a) + b",
        "test_imports": ["import math"], "test_list": ["assert plus(math.floor(1.5), 2) == 3"],
    }  # fmt: skip
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([clean]))
    return tmp_path


def test_pass_at_k_counts_the_choices_of_k() -> None:
    right = [True, False, False, True, False, False, False]
    for k in range(1, 8):
        chosen = list(combinations(right, k))
        assert pass_at_k(7, 2, k) == pytest.approx(fmean(map(any, chosen)), abs=1e-15)
    assert pass_at_k(200, 0, 100) == 0.0
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(10**5, 3, 10**4) == pytest.approx(0.271, abs=1e-3)
    assert pass_at_k(5, 4, 2) == 1.0


def test_mean_pass_at_k_weighs_problems_alike() -> None:
    problems = [[True, False], [False] * 10, [True]]
    assert mean_pass_at_k(problems, 1) == pytest.approx((0.5 + 0 + 1) / 3)


@pytest.mark.parametrize("counts", [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_of_counts_that_cannot_be(counts: tuple[int, int, int]) -> None:
    with pytest.raises(UserError):
        pass_at_k(*counts)
    with pytest.raises(UserError):
        mean_pass_at_k([], 1)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("    return 2 * x\n", True),
        ("\n    return 2 * x", True),
        ("    return 2 * x\n\n\ndef other():\n    1 / 0\n1 / 0", True),
        ("    return 2 * x\n\nprint(twice(1 / 0))", True),
        ("    return 2 * x\n\nif __name__ == '__main__':\n    1 / 0", True),
        ("    return 2 * x\n\ndef twice(x):\n    return 0", True),
        ("    return 2 * x\n```\nThat is it.", True),
        ("Here it is:\n```python\ndef twice(x):\n    return 2 * x\n```\nEnjoy!", True),
        ("```\ndef twice(x):\n    return x + int(2 * half(x))\n```", True),
        ("```python\ndef twice(x):\n    return 2 * x\n\nassert twice(1) == 3\n```", True),
        ("```python\nx = 1\n```\nor\n```python\ndef twice(x):\n    return 2 * x", True),
        ("def two():\n    return 2\n\ndef twice(x):\n    return two() * x\n", True),
        ("```python\n    return 2 * x\n```", True),
        ("def half(x):\n    return 0\ndef twice(x):\n    return 0", False),
        ("    return 2 * x + 1", False),
        ("return 2 * x", False),
        ("    pass", False),
        ("    # 2 * x", False),
        ("```python\n```", False),
        ("I cannot.", False),
        ("", False),
        (PROMPT, False),
    ],
)
def test_humaneval_completions(humaneval: HumanEval, completion: str, right: bool) -> None:
    [example] = humaneval.examples("test")
    assert humaneval.score(example, completion).correct is right


def test_humaneval_styles_and_splits(humaneval: HumanEval) -> None:
    assert humaneval.examples("train") == []
    assert check(humaneval, "test").passed
    chat = HumanEval(path=humaneval.path, style="chat", unsafe_exec=True)
    assert check(chat, "test").passed
    [message] = chat.prompt(chat.examples("test")[0])
    assert PROMPT.rstrip() in message["content"]  # type: ignore[index]


def test_mbpp_splits_by_id(mbpp: Path) -> None:
    task = MBPP(path=str(mbpp), unsafe_exec=True)
    assert [e.id for e in task.examples("test")] == ["11", "510"]
    assert [e.id for e in task.examples("train")] == ["601", "974"]
    validation = MBPP(path=str(mbpp / "mbpp.jsonl"), held_out="validation", unsafe_exec=True)
    assert [e.id for e in validation.examples("test")] == ["511", "600"]
    clean = MBPP(path=str(mbpp), subset="sanitized", unsafe_exec=True)
    assert [e.id for e in clean.examples("test")] == ["11"]
    assert check(clean, "test").failures[0].what == "gold"  # its code lacks the import
    (mbpp / "mbpp.jsonl").unlink()
    with pytest.raises(UserError, match="no file of this subset"):
        MBPP(path=str(mbpp), unsafe_exec=True).examples("test")


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_mbpp_prompts_and_scores(mbpp: Path, style: Any) -> None:
    task = MBPP(path=str(mbpp), style=style, shots=2, examples=1, unsafe_exec=True)
    assert check(task, "test").passed
    [example] = task.examples("test")
    prompt = task.prompt(example)
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    assert text.index("def shot2") < text.index("def shot3") < text.index("assert add(1, 2)")
    assert text.count("TWO = 2") == 2
    assert "ONE =" not in text
    partly = task.score(example, "def add(a, b):\n    return 3\n[DONE]\n1 / 0")
    assert (partly.reward, partly.correct, partly.parts["tests"]) == (0.0, False, 1 / 3)
    slow = MBPP(path=str(mbpp), timeout=0.3, unsafe_exec=True)
    stopped = slow.score(example, "def add(a, b):\n    while True: pass")
    assert stopped.parts == {"passed": 0.0, "tests": 0.0, "stopped": 1.0}


def test_mbpp_gives_the_program_its_own_objects(tmp_path: Path) -> None:
    row = {
        "text": "Depth.", "task_id": 11,
        "code": "class Node:\n    def __init__(self, x):\n        self.left = None\n"
        "def depth(n):\n    return 1 + depth(n.left) if n else 0",
        "test_setup_code": "root = Node(1)\r\nroot.left = Node(2)",
        "test_list": ["assert depth(root) == 2", "assert depth(root.left) == 1"],
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert check(MBPP(path=str(tmp_path / "rows.jsonl"), unsafe_exec=True), "test").passed


def test_whole_program_keeps_what_stands_before() -> None:
    text = "Sure.\nR = 3\nimport math\ndef f(x):\n    return x\nprint(f(1))\n"
    assert whole_program(text, "f") == "R = 3\nimport math\ndef f(x):\n    return x\n"
    assert continued_function("def f():\n", "    return 1\n#x", "f") == "def f():\n    return 1\n"


def test_programs_are_cut_in_linear_time() -> None:
    began = time.process_time()
    for text in ("```" * 10**5, "\n" * 10**6, "def f" * 10**5, " " * 10**6, "```\n" * 10**5):
        whole_program(text, "f")
        continued_function("def f():\n", text, "f")
    assert time.process_time() - began < 30, "quadratic time takes hours here"


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for change, message in [
        ({"code": "def other(): pass"}, "line 1: its tests use nothing"),
        ({"code": "def"}, "line 1: its code or tests are not Python"),
        ({"test_list": "assert"}, "line 1: `test_list`"),
        ({"test_list": []}, "line 1: `test_list`"),
        ({"text": None}, "line 1: `text`"),
    ]:
        path.write_text(json.dumps({**MBPP_ROWS[0], **change}))
        with pytest.raises(UserError, match=message):
            MBPP(path=str(path), unsafe_exec=True).examples("test")
    path.write_text(json.dumps({**HUMANEVAL_ROW, "entry_point": 1}))
    with pytest.raises(UserError, match="line 1: `entry_point`"):
        HumanEval(path=str(path), unsafe_exec=True).examples("test")


@pytest.mark.parametrize("options", [{"shots": 8}, {"examples": 0}, {"style": "prose"}])
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        tasks.get("mbpp", unsafe_exec=True, **options)


def test_refuses_without_isolation_before_anything_is_generated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(code.sandbox, "why_not_isolated", lambda: "no user namespaces")
    for name in ("humaneval", "mbpp"):
        with pytest.raises(UserError, match="--unsafe-exec"):
            tasks.get(name)
        tasks.get(name, unsafe_exec=True)


def reference(program: str, test: str, timeout: float) -> sandbox.Outcome:
    """As the official scorers judge: program and tests in one interpreter, to the end."""
    return sandbox.run(f"{program}\n{test}", unsafe=True, timeout=timeout)


def agreed(make: Callable[[float], Any], example: Example, program: str, test: str) -> bool:
    """The verdict, asserted to be the official one.

    Where they differ because one of them ran out of time, both are asked again with plenty: a
    machine that is busy is slow by chance.
    """
    for timeout in (10.0, 90.0):
        ours, theirs = make(timeout).score(example, program), reference(program, test, timeout)
        same = ours.correct == (theirs.status == "finished")
        if same or not (ours.parts["stopped"] or theirs.status == "timeout"):
            break
    assert same, (example.id, program)
    return bool(ours.correct)


def humaneval_agrees(example: Example, count: int) -> list[bool]:
    data = example.data
    name = data["entry_point"]
    verdicts = []
    made = mutants(data["prompt"] + data["solution"], name, int(example.id.split("/")[1]), count)
    for program in (data["prompt"] + data["solution"], *made.values()):
        test = f"{data['test']}\ncheck({name})"
        verdicts.append(agreed(humaneval_task, example, program, test))
    return verdicts


def mbpp_agrees(example: Example, count: int) -> list[bool]:
    data = example.data
    verdicts = []
    made = mutants(data["solution"], data["names"][0], int(example.id), count)
    for program in (data["solution"], *made.values()):
        test = "\n".join([data["given"], *data["tests"]])
        verdicts.append(agreed(mbpp_task, example, program, test))
    return verdicts


def humaneval_task(timeout: float) -> HumanEval:
    return HumanEval(path=str(DATA / "humaneval"), timeout=timeout, unsafe_exec=True)


def mbpp_task(timeout: float) -> MBPP:
    return MBPP(path=str(DATA / "mbpp"), timeout=timeout, unsafe_exec=True)


@needs_data
def test_agrees_with_plain_execution_on_canonical_and_mutated_solutions() -> None:
    rows = humaneval_task(10.0).examples("test")
    assert len(rows) == 164
    verdicts = [humaneval_agrees(rows[i], 1) for i in (0, 32, 38, 61, 129)]
    mbpp = mbpp_task(10.0)
    own = {e.id: e for split in ("train", "test") for e in mbpp.examples(split)}  # type: ignore[arg-type]
    assert len(own) == 500 + 374
    verdicts += [mbpp_agrees(own[i], 1) for i in ("11", "126", "367", "601")]
    assert all(gold for gold, *_ in verdicts)
    wrong = [not right for _, *others in verdicts for right in others]
    assert sum(wrong) > 0.6 * len(wrong)


@needs_data
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_agrees_on_all_of_both_sets() -> None:
    for example in humaneval_task(10.0).examples("test"):
        assert humaneval_agrees(example, 2)[0], example.id
    for subset in ("full", "sanitized"):
        mbpp = MBPP(path=str(DATA / "mbpp"), subset=subset, unsafe_exec=True)  # type: ignore[arg-type]
        for split in ("train", "test"):
            for example in mbpp.examples(split):  # type: ignore[arg-type]
                assert mbpp_agrees(example, 1)[0], example.id
