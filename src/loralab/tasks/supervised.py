"""A user's own rows as a task: prompts with the completions wanted for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from loralab import tasks
from loralab.config import SftConfig
from loralab.data.sources import Row, read_rows
from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split, Task, is_message
from loralab.tasks.splits import cut, text_field

Format = Literal["prompt_completion", "chat", "text"]


def task_of(config: SftConfig) -> Task:
    """The task that gives the rows: the config's, or its own data as one."""
    if config.task is not None:
        return tasks.get(config.task.name, **config.task.options)
    assert config.data is not None
    return tasks.get("supervised", seed=config.seed, **config.data.model_dump())


class Supervised:
    """Rows from a file or folder; a completion that is the wanted one, but for space, scores 1.

    format: "prompt_completion": `prompt` (text or messages) and `completion` (text or messages).
        "chat": `messages`, the last of them the assistant's, which is the completion. "text":
        `text`, all of which is learned; there is nothing to prompt, so nothing is held out.
    test_path: rows of the test split. Without it, test_share of the rows, chosen by the seed.
    """

    name = "supervised"
    reward_floor = 0.0
    full_marks = 1.0

    def __init__(
        self,
        *,
        path: str,
        format: Format = "prompt_completion",
        test_path: str | None = None,
        test_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not 0 < test_share < 1:
            raise UserError(f"supervised: test_share is {test_share}, expected between 0 and 1")
        self.path = path
        self.format = format
        self.test_path = test_path
        self.test_share = test_share
        self.seed = seed

    def examples(self, split: Split) -> Sequence[Example]:
        """Data holds `prompt` and `completion`; an id is the place in its file."""
        return self._splits[split]

    def prompt(self, example: Example) -> Prompt:
        """The row's own."""
        prompt: Prompt = example.data["prompt"]
        return prompt

    def score(self, example: Example, completion: str) -> Score:
        """1 for the wanted text, space at its ends apart."""
        right = completion.strip() == str(example.data["completion"]).strip()
        return Score(float(right), right, {"same": float(right)})

    def gold(self, example: Example) -> str | None:
        """The row's completion."""
        return str(example.data["completion"])

    @cached_property
    def _splits(self) -> dict[Split, list[Example]]:
        rows = read_rows(self.path)
        if self.format == "text":
            found: dict[Split, list[Row]] = {"train": rows, "test": []}
        elif self.test_path is not None:
            found = {"train": rows, "test": read_rows(self.test_path)}
        else:
            found = cut(rows, self.test_share, self.seed)
        return {split: [self._example(row) for row in part] for split, part in found.items()}

    def _example(self, row: Row) -> Example:
        prompt: Prompt
        if self.format == "text":
            prompt, completion = "", text_field(row, "text")
        elif self.format == "chat":
            turns = _messages(row.data.get("messages"), f"{row.place}: `messages`")
            if len(turns) < 2 or turns[-1]["role"] != "assistant":
                raise UserError(
                    f"{row.place}: the last of `messages` has to be the assistant's, after another"
                )
            prompt, completion = turns[:-1], turns[-1]["content"]
        else:
            prompt = _prompt(row)
            completion = _completion(row)
        return Example(row.place, {"prompt": prompt, "completion": completion})


def _prompt(row: Row) -> Prompt:
    value = row.data.get("prompt")
    return value if isinstance(value, str) else _messages(value, f"{row.place}: `prompt`")


def _completion(row: Row) -> str:
    value = row.data.get("completion")
    if isinstance(value, str):
        return value
    turns = _messages(value, f"{row.place}: `completion`")
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise UserError(f"{row.place}: `completion` has to be one message of the assistant's")
    return turns[0]["content"]


def _messages(value: Any, what: str) -> list[Message]:
    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        raise UserError(f"{what}: expected text or messages, each with text `role` and `content`")
    return [Message(role=turn["role"], content=turn["content"]) for turn in value]
