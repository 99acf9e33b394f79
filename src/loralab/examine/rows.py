"""Rows to be learned, as the doctor takes them: of a task, or of a file that somebody names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loralab import tasks
from loralab.data.sources import read_rows
from loralab.errors import UserError
from loralab.gradient.rows import Row, RowEncoder
from loralab.health.data import DataProbe
from loralab.tasks.base import Split, Task

MOST_ROWS = 2000


def rows_of(task: Task, split: Split, tokenizer: Any, most: int = MOST_ROWS) -> list[Row]:
    """Rows as training makes them, those with nothing to learn among them."""
    encoder = RowEncoder(tokenizer)
    rows: list[Row] = []
    for example in task.examples(split):
        gold = task.gold(example)
        if gold is not None:
            rows.append(encoder.encode(task.prompt(example), gold))
        if len(rows) == most:
            break
    return rows


def probe_of(data: Any, max_length: int) -> Callable[[Any], DataProbe]:
    def make(tokenizer: Any) -> DataProbe:
        if not isinstance(data, str | Path):
            return DataProbe(data, tokenizer)
        task = tasks.get("supervised", path=str(data), format=_format(data))
        # The split is the task's own; a file is one thing here.
        rows = [*rows_of(task, "train", tokenizer), *rows_of(task, "test", tokenizer)]
        return DataProbe([cut(row, max_length) for row in rows], tokenizer, max_length=max_length)

    return make


def _format(data: str | Path) -> str:
    columns = set(read_rows(data)[0].data)
    for name, needed in (
        ("chat", {"messages"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("text", {"text"}),
    ):
        if needed <= columns:
            return name
    raise UserError(
        f"{data}: its columns are {', '.join(sorted(columns))}; expected `messages`, `prompt` and "
        "`completion`, or `text`"
    )


def cut(row: Row, max_length: int) -> Row:
    return Row(row.input_ids[:max_length], row.labels[:max_length])
