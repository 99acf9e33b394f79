"""GSM8K: the number is read as a person reads it, and nothing else scores."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from loralab import tasks
from loralab.errors import UserError
from loralab.tasks.base import Message
from loralab.tasks.check import check
from loralab.tasks.gsm8k import GSM8K, final_number

DATA = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
ROWS = [
    ("Ann has 3 apples and eats 1. How many are left of the 3?", "3-1=<<3-1=2>>2 left.\n#### 2"),
    ("A car costs $1,200. Two cost?", "2*1,200=$<<2*1200=2400>>2,400\n#### 2,400"),
    ("What is 10 less 14?", "10-14=<<10-14=-4>>-4\n#### -4"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ROWS)
    (tmp_path / "test.jsonl").write_text(lines)
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write(lines)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("so 3 + 4 = 7\n#### 7\n", "7"),
        ("#### $1,234.50 in all", "1234.5"),
        ("#### **72**", "72"),
        ("####72.", "72"),
        ("The answer is 1,000.", "1000"),
        ("She pays $72.00.", "72"),
        ("That is 50%.", "50"),
        ("It is -4 degrees", "-4"),
        ("It is −4 degrees", "-4"),
        ("= -4", "-4"),
        ("-$5", "-5"),
        ("#### $-5", "-5"),
        ("Profit:-5", "-5"),
        ("Ages:\n- 7\n- 18", "18"),
        ("#### - 18", "18"),
        ("between 3-4", "4"),
        ("5%-10%", "10"),
        ("20km-30km", "30"),
        ("(3)-4", "4"),
        ("#### 5\nWait.\n#### 6", "6"),
        ("#### none", None),
        ("no number", None),
        ("", None),
        ("007", "7"),
        ("0.50", "0.5"),
        ("-0", "0"),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_reading_is_bounded_in_time() -> None:
    assert final_number("1," * 200_000) is not None
    assert final_number("$ - " * 200_000) is None


def test_gold_has_no_calculator_marks_and_scores_full(folder: Path) -> None:
    task = GSM8K(path=str(folder))
    examples = task.examples("train")
    assert task.gold(examples[1]) == "2*1,200=$2,400\n#### 2,400"
    assert [e.data["answer"] for e in examples] == ["2", "2400", "-4"]
    for split in ("train", "test"):
        assert check(task, split).passed  # type: ignore[arg-type]


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_a_copied_problem_scores_nothing_though_it_ends_in_the_answer(style: str) -> None:
    task = GSM8K(path="nowhere/nothing", style=style)  # type: ignore[arg-type]
    data = {"question": "I had 5 and lost 0. Was it 5?", "solution": "#### 5", "answer": "5"}
    example = tasks.base.Example("x", data)
    assert task.score(example, "It is 5").correct
    assert not task.score(example, data["question"]).correct
    assert not task.score(example, f"Problem: {data['question']} 6").correct
    # A model that goes on with a problem of its own is judged by its first answer.
    assert task.score(example, "#### 5\n\nQuestion: What is 1 + 1?\nAnswer: 2").correct


def test_shots_are_solved_training_problems_but_never_the_problem_itself(folder: Path) -> None:
    task = GSM8K(path=str(folder), shots=2, style="plain")
    for example in task.examples("train"):
        prompt = task.prompt(example)
        assert isinstance(prompt, str)
        assert prompt.count("Answer:") == 3
        assert prompt.count(str(example.data["question"])) == 1
        assert prompt.endswith("Answer:")
        assert "<<" not in prompt
    [message] = GSM8K(path=str(folder), shots=1).prompt(task.examples("test")[0])
    assert Message(role="user", content=message["content"]) == message  # type: ignore[index]
    assert task.examples("test") == GSM8K(path=str(folder)).examples("test")


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shots is 99"):
        tasks.get("gsm8k", shots=99)
    (folder / "test.jsonl").write_text(json.dumps({"question": "q", "answer": "no mark"}))
    with pytest.raises(UserError, match=r'test.jsonl line 1: `answer` holds no "####"'):
        tasks.get("gsm8k", path=str(folder)).examples("test")
    (folder / "test.jsonl").unlink()
    with pytest.raises(UserError, match="holds no test file"):
        tasks.get("gsm8k", path=str(folder)).examples("test")
    with pytest.raises(UserError, match="expected a file, a folder"):
        tasks.get("gsm8k", path="/nowhere").examples("test")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no GSM8K at {DATA.name} beside the project")
@pytest.mark.parametrize(("shots", "style"), [(0, "chat"), (4, "plain")])
def test_every_real_gold_answer_scores_and_no_copied_prompt_does(shots: int, style: str) -> None:
    task = GSM8K(path=str(DATA), shots=shots, style=style)  # type: ignore[arg-type]
    assert (len(task.examples("train")), len(task.examples("test"))) == (7473, 1319)
    assert check(task, "test").passed
    assert check(task, "train", 500).passed
