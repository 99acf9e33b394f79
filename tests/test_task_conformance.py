"""What every task owes: read from a hub name, file or folder; gold full marks, non-answers none;
shots that are never the question itself."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from loralab import cli, tasks
from loralab.errors import UserError
from loralab.registry import TASKS
from loralab.tasks import splits
from loralab.tasks.base import Example, Optioned, Task
from loralab.tasks.check import check
from loralab.tasks.choice import NAMES

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")

CHOICE_ROW = {
    "instruction": "Please choose: which?\n\nAnswer1: a Answer2: b\n\n"
    "Answer format: answer1/answer2",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}
ROWS: dict[str, dict[str, Any]] = {
    "choice": CHOICE_ROW,
    "conciseness": {"question": "What is frozen water?", "target": "Ice", "aliases": ["ice"]},
    "countdown": {"nums": [3, 5, 7], "target": 36, "solution": "(5 + 7) * 3"},
    "gsm8k": {"question": "What is 3 and 4?", "answer": "3+4=<<3+4=7>>7\n#### 7"},
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": 'def twice(x):\n    """Twice x."""\n',
        "entry_point": "twice",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    },
    "mbpp": {
        "task_id": 11,
        "text": "Add.",
        "code": "def add(a, b):\n    return a + b",
        "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3"],
    },
    "samsum": {"dialogue": "Ann: coming?\nBob: yes", "summary": "Bob is coming."},
    "sst2": {"sentence": "a fine film", "label": 1},
    "text": {"text": " ".join(f"word{i}" for i in range(70))},
}
"""A row of each task's published form, so that nothing here needs the data."""

OPTIONS: dict[str, dict[str, Any]] = {
    "choice": {"dataset": "piqa"},
    "humaneval": {"unsafe_exec": True},
    "mbpp": {"unsafe_exec": True},
}


def made(name: str, path: Path | str, **options: Any) -> Task:
    return tasks.get(name, path=str(path), **OPTIONS.get(name, {}), **options)


def several(name: str, count: int) -> list[dict[str, Any]]:
    """Rows that differ, as countdown keeps different problems only."""
    rows = [dict(ROWS[name]) for _ in range(count)]
    for number, row in enumerate(rows):
        if name == "countdown":
            row |= {"nums": [number, 5, 7], "target": 12 * number, "solution": None}
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(lines)
    else:
        path.write_text(lines)
    return path


def test_every_task_is_tried_here() -> None:
    assert set(ROWS) == set(TASKS.builtin) - {"supervised"}, "supervised reads users' own rows"


@pytest.mark.parametrize("name", ROWS)
def test_each_is_read_from_a_folder_and_from_a_file(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl.gz", several(name, 4))
    write(folder / "test.jsonl", several(name, 3))
    file = write(tmp_path / "rows.jsonl", several(name, 5))
    for path in (folder, file):
        task = made(name, path)
        assert task.examples("test"), path
        assert check(task, "test", 1).passed, (path, check(task, "test", 1).failures)


@pytest.mark.parametrize("name", ROWS)
def test_each_is_read_from_the_hub_and_without_one_says_so_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(path: str, subset: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, split))
        return several(name, 3)

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(splits, "_reachable", lambda: True)
    assert made(name, "somebody/set").examples("test")
    assert {path for path, _ in asked} == {"somebody/set"}

    monkeypatch.setattr(splits, "_reachable", lambda: False)
    options = [f"--option={k}={v}" for k, v in OPTIONS.get(name, {}).items()]
    words = ["tasks", "check", name, "--option", "path=somebody/set", *options]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "'somebody/set'" in err
    assert "cannot be reached" in err


def test_a_file_named_train_is_the_train_split(tmp_path: Path) -> None:
    task = made("gsm8k", write(tmp_path / "train.jsonl", several("gsm8k", 3)))
    assert (len(task.examples("train")), len(task.examples("test"))) == (3, 0)


WITH_SHOTS = [name for name in ROWS if name not in ("humaneval", "text")]


@pytest.mark.parametrize("name", WITH_SHOTS)
def test_shots_need_a_train_split(name: str, tmp_path: Path) -> None:
    if name in ("choice", "countdown", "mbpp"):
        pytest.skip("it cuts its own train split from one file")
    file = write(tmp_path / "rows.jsonl", several(name, 3))
    task = made(name, file, shots=2)
    with pytest.raises(UserError, match=r"shots is 2, but .* 0 training examples"):
        task.prompt(task.examples("test")[0])


def shown(task: Task, example: Example) -> str:
    prompt = task.prompt(example)
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


REAL: dict[str, dict[str, Any]] = {
    "conciseness": {},
    "countdown": {"examples": 100},
    "gsm8k": {"path": "gsm8k"},
    "humaneval": {"path": "humaneval", "unsafe_exec": True},
    "mbpp": {"path": "mbpp", "unsafe_exec": True},
    "samsum": {"path": "samsum"},
    "sst2": {"path": "sst2"},
    "text": {"path": "wikitext-2", "words": 32},
    **{f"choice {name}": {"path": "commonsense", "dataset": name} for name in NAMES},
}


def real(name: str, **options: Any) -> Task:
    given = {**REAL[name], **options}
    if "path" in given:
        given["path"] = str(DATA / given["path"])
    return tasks.get(name.split()[0], **given)


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_gold_scores_full_and_no_non_answer_does_on_real_rows(name: str) -> None:
    task = real(name)
    result = check(task, "test", 1 if name in ("humaneval", "mbpp") else 60)
    assert result.passed, result.failures[:3]
    assert not result.without_gold
    assert isinstance(task, Optioned) == name.startswith(("choice", "sst2"))


@needs_data
@pytest.mark.parametrize("name", [name for name in REAL if name not in ("humaneval", "text")])
def test_shots_are_the_same_few_solved_examples_and_never_the_question(name: str) -> None:
    plain, task, again = real(name), real(name, shots=2), real(name, shots=2)
    train = "test" if name == "mbpp" else "train"
    examples = [*task.examples("test")[:3], *task.examples(train)[:3]]  # type: ignore[arg-type]
    if name != "mbpp":  # whose shots are of ids that are in no split
        examples.append(task._drawn[0])  # type: ignore[attr-defined]
        assert check(task, "test", 20).passed, check(task, "test", 20).failures[:2]
    for example in examples:
        text, own = shown(task, example), key(plain, example)
        assert text.count(own) == 1, example.id
        assert len(text) > len(shown(plain, example)) + (20 if name != "conciseness" else 5)
        assert text == shown(again, example)


def key(task: Task, example: Example) -> str:
    """Words of the question that no other has."""
    if "numbers" in example.data:
        return "Numbers: " + ", ".join(map(str, example.data["numbers"]))
    text = shown(task, example)
    found = [v for v in example.data.values() if isinstance(v, str) and v in text]
    return max(found, key=len)
