"""A user's own rows: three formats, and one line about what is wrong with a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loralab import tasks
from loralab.errors import UserError
from loralab.tasks.supervised import Supervised


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_the_formats(tmp_path: Path) -> None:
    pairs = write(
        tmp_path / "a.jsonl",
        {"prompt": "q", "completion": "a"},
        {"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")]},
    )
    test = write(tmp_path / "t.jsonl", {"prompt": "tq", "completion": "ta"})
    task = Supervised(path=pairs, test_path=test)
    train = task.examples("train")
    assert [task.prompt(e) for e in train] == ["q", [turn("user", "q")]]
    assert [task.gold(e) for e in train] == ["a", "a"]
    assert task.score(train[0], " a\n").correct
    assert not task.score(train[0], "a b").correct
    assert [task.prompt(e) for e in task.examples("test")] == ["tq"]

    chat = [turn("system", "s"), turn("user", "q"), turn("assistant", "a")]
    path = write(tmp_path / "c.jsonl", {"messages": chat}, {"messages": chat[1:]})
    task = Supervised(path=path, format="chat", test_share=0.5)
    both = [*task.examples("train"), *task.examples("test")]
    assert {len(task.prompt(e)) for e in both} == {1, 2}
    assert {task.gold(e) for e in both} == {"a"}

    task = Supervised(path=write(tmp_path / "x.jsonl", {"text": "words"}), format="text")
    [example] = task.examples("train")
    assert (task.prompt(example), task.gold(example)) == ("", "words")
    assert task.examples("test") == []


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("prompt_completion", {"prompt": "q"}, "`completion`: expected text or messages"),
        ("prompt_completion", {"prompt": 3, "completion": "a"}, "`prompt`: expected text"),
        ("chat", {"messages": [turn("user", "q")]}, "the last of `messages` has to be"),
        ("chat", {"messages": "hello"}, "`messages`: expected text or messages"),
        ("text", {"texts": "q"}, "`text` is None, expected text"),
    ],
)
def test_what_is_wrong_with_a_row_is_named(
    tmp_path: Path, format: str, row: dict[str, Any], expected: str
) -> None:
    path = write(tmp_path / "a.jsonl", row, row)
    with pytest.raises(UserError) as caught:
        tasks.get("supervised", path=path, format=format).examples("train")
    assert expected in str(caught.value)
    assert str(caught.value).startswith("a.jsonl line ")
