"""Pairs of a chosen and a rejected answer to one prompt, and the forms they come in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loralab.config.dpo import PreferenceDataConfig
from loralab.data.sources import Row, data_files, read_rows
from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split, is_message
from loralab.tasks.splits import cut, rows_of_split

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. id: the place in its file."""

    id: str
    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Parsed:
    """Pairs, and how many rows were left out for each reason."""

    pairs: tuple[Pair, ...]
    dropped: Mapping[str, int]


class Preferences:
    """The pairs of a config as a task: prompts to answer, the chosen answer as gold.

    What a free answer is worth no rule can say: only the chosen answer itself scores 1.
    """

    name = "preferences"
    reward_floor = 0.0
    full_marks = 1.0

    def __init__(self, config: PreferenceDataConfig, seed: int) -> None:
        self._config = config
        self._seed = seed

    def pairs(self, split: Split) -> Parsed:
        """The pairs of a split, in the order of their file.

        Raises:
            UserError: the data cannot be read, or a row is not a pair, with its place.
        """
        return self._splits[split]

    def examples(self, split: Split) -> Sequence[Example]:
        """Data holds `prompt` and `completion`, the chosen answer."""
        return [
            Example(pair.id, {"prompt": pair.prompt, "completion": pair.chosen})
            for pair in self.pairs(split).pairs
        ]

    def prompt(self, example: Example) -> Prompt:
        """The conversation before the answer."""
        prompt: Prompt = example.data["prompt"]
        return prompt

    def score(self, example: Example, completion: str) -> Score:
        """1 for the chosen answer, space at its ends apart."""
        same = completion.strip() == str(example.data["completion"]).strip()
        return Score(float(same), None, {"same": float(same)})

    def gold(self, example: Example) -> str | None:
        """The chosen answer."""
        return str(example.data["completion"])

    @cached_property
    def _splits(self) -> dict[Split, Parsed]:
        return {split: parse(rows) for split, rows in self._rows().items()}

    def _rows(self) -> dict[Split, list[Row]]:
        config = self._config
        path = Path(config.path).expanduser()
        if path.is_file():
            train, test = read_rows(path), list[Row]()
        else:
            train = rows_of_split(config.path, "train", config.subset)
            test = rows_of_split(config.path, "test", config.subset)
        if config.test_path is not None:
            test = [row for file in data_files(config.test_path) for row in read_rows(file)]
        if not train:
            raise UserError(f"{config.path}: no file of the folder begins with `train`")
        if test:
            return {"train": train, "test": test}
        return cut(train, config.test_share, self._seed)


def parse(rows: Sequence[Row]) -> Parsed:
    """Pairs of rows; what is no preference between two answers to one prompt is left out.

    Raises:
        UserError: a row that is in no known form, with its place.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        made = _pair(row)
        if isinstance(made, Pair):
            pairs.append(made)
        else:
            dropped[made] += 1
    return Parsed(tuple(pairs), dict(dropped))


def turns_of(text: str) -> list[Message]:
    r"""The turns of a conversation in HH-RLHF's form, "\n\nHuman: ...\n\nAssistant: ...".

    A turn cut in two by its own marker is put together again. [] where there is text before the
    first turn.
    """
    head, *parts = _TURN.split(text)
    if head.strip():
        return []
    turns: list[Message] = []
    for name, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLES[name], said.strip()
        if turns and turns[-1]["role"] == role:
            joined = "\n\n".join(part for part in (turns[-1]["content"], content) if part)
            turns[-1] = Message(role=role, content=joined)
        else:
            turns.append(Message(role=role, content=content))
    return turns


def _pair(row: Row) -> Pair | str:
    """The pair of a row, or the reason why there is none in it."""
    chosen, rejected = row.data.get("chosen"), row.data.get("rejected")
    if chosen == rejected and chosen is not None:
        return "identical"
    prompt = row.data.get("prompt")
    if prompt is not None:
        given: Prompt = prompt if isinstance(prompt, str) else _messages(prompt, row, "prompt")
        answers = [_answer(row, name) for name in ("chosen", "rejected")]
        befores: list[Prompt] = [given, given]
    else:
        conversations = [_conversation(row, name) for name in ("chosen", "rejected")]
        if any(turns[-1]["role"] != "assistant" for turns in conversations):
            return "no last answer"
        befores = [turns[:-1] for turns in conversations]
        answers = [turns[-1]["content"] for turns in conversations]
    if befores[0] != befores[1]:
        return "different prompts"
    if not befores[0]:
        return "no prompt"
    if not all(answer.strip() for answer in answers):
        return "empty answer"
    if answers[0].strip() == answers[1].strip():
        return "identical"
    return Pair(row.place, befores[0], *answers)


def _conversation(row: Row, name: str) -> list[Message]:
    value = row.data.get(name)
    if not isinstance(value, str):
        return _messages(value, row, name)
    turns = turns_of(value)
    if not turns:
        raise UserError(
            f"{row.place}: `{name}` is text without a `prompt` beside it and does not begin with a "
            r'turn; expected "\n\nHuman: ...\n\nAssistant: ...", messages, or a `prompt`'
        )
    return turns


def _answer(row: Row, name: str) -> str:
    value = row.data.get(name)
    if isinstance(value, str):
        return value
    turns = _messages(value, row, name)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise UserError(f"{row.place}: `{name}` beside a `prompt` has to be one assistant message")
    return turns[0]["content"]


def _messages(value: Any, row: Row, name: str) -> list[Message]:
    fine = isinstance(value, Sequence) and not isinstance(value, str) and bool(value)
    if not fine or not all(is_message(turn) for turn in value):
        raise UserError(
            f"{row.place}: `{name}` is {str(value)[:60]!r}; expected text, or messages, each with "
            "text `role` and `content`"
        )
    return [Message(role=turn["role"], content=turn["content"]) for turn in value]
