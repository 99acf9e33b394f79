"""Names resolve late, unknown ones are answered in one helpful line."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest

from loralab import tasks
from loralab.errors import UserError
from loralab.registry import TASKS, Registry
from loralab.tasks.base import Task

NEED_FILES = {"supervised", "text"}
"""Tasks that read their file when they are made."""


def _takes_path(made: Any) -> bool:
    return "path" in inspect.signature(made).parameters


def test_every_builtin_task_resolves_to_a_task_of_that_name() -> None:
    assert {"conciseness", "countdown"} <= set(tasks.names())
    needed = {"choice": {"dataset": "openbookqa"}}
    for name in TASKS.builtin:
        made = TASKS.load(name)
        options = needed.get(name, {}) | ({"path": "nowhere"} if _takes_path(made) else {})
        task = tasks.get(name, **options) if name not in NEED_FILES else None
        assert task is None or isinstance(task, Task)
        assert task is None or task.name.startswith(name)


def test_listing_tasks_imports_no_task_and_nothing_heavy() -> None:
    code = (
        "import sys, loralab.tasks; loralab.tasks.names();"
        "heavy = {'torch', 'transformers', 'pyarrow', 'pydantic', 'numpy',"
        " 'loralab.tasks.countdown', 'loralab.data.sources'};"
        "print(sorted(heavy & set(sys.modules)));"
        "loralab.tasks.get('countdown').examples('train');"
        "print(sorted({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("countdwn", {}, ["unknown task 'countdwn'", "did you mean 'countdown'?", "conciseness"]),
        ("zzz", {}, ["unknown task 'zzz': known: ", "conciseness, countdown"]),
        ("countdown", {"exampels": 3}, ["no option 'exampels'", "did you mean 'examples'?"]),
        ("countdown", {"examples": "many"}, ["option examples is 'many'", "integer"]),
        ("countdown", {"prompt_style": "loud"}, ["prompt_style is 'loud'", "'chat' or 'plain'"]),
        ("countdown", {"test_share": 1.0}, ["test_share is 1.0"]),
        ("countdown", {"examples": 1}, ["examples is 1"]),
        ("countdown", {"sizes": [9]}, ["sizes is [9]"]),
        ("countdown", {"max_number": 0}, ["max_number is 0"]),
        ("countdown", {"test_path": "x.json"}, ["test_path needs path"]),
        ("conciseness", {"examples": 3}, ["'conciseness' has no option 'examples'", "path"]),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    name: str, options: dict[str, object], expected: list[str]
) -> None:
    with pytest.raises(UserError) as raised:
        tasks.get(name, **options)
    message = str(raised.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_options_from_a_command_line_become_their_types() -> None:
    task = tasks.get("countdown", examples="10", test_share="0.5", sizes=[3])
    assert len(task.examples("train")) == len(task.examples("test")) == 5


class Riddles:
    """What another package would add."""

    def __init__(self, **anything: int) -> None:
        self.options = anything


def _with_entry_points(monkeypatch: pytest.MonkeyPatch, **points: str) -> Registry:
    found = EntryPoints(EntryPoint(n, v, "loralab.tasks") for n, v in points.items())
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found.select(group=group))
    return Registry("task", "loralab.tasks", TASKS.builtin)


def test_another_package_adds_a_name_but_cannot_take_one(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = f"{__name__}:Riddles"
    registry = _with_entry_points(monkeypatch, riddles=theirs, countdown=theirs)
    assert registry.names() == sorted([*TASKS.builtin, "riddles"])
    assert registry.create("riddles", {"hard": 3}).options == {"hard": 3}
    assert registry.create("countdown", {}).name == "countdown"


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = _with_entry_points(monkeypatch, riddles="no_such_package.riddles:Riddles")
    with pytest.raises(UserError, match=r"no_such_package\.riddles:Riddles.*No module named"):
        registry.load("riddles")


def test_a_missing_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("task", "none", {"row": "loralab.data.sources:Row"})
    with pytest.raises(UserError, match="task 'row' needs option 'place'"):
        registry.create("row", {"data": {}})
