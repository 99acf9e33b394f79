"""Prompts and completions become rows of tokens with a label each: -100 where nothing is learned.

What is learned is the completion and the end token behind it, so that a model learns to stop. The
labels come from where the completion begins, never from comparing ids with the padding id: in
many tokenizers padding and end are one token, and masking by id unlearns stopping.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.engines.prompts import PromptEncoder
from loralab.errors import UserError
from loralab.tasks.base import Message, Prompt, Split, Task

IGNORED = -100
"""The label of a token that is not learned, as in Transformers."""


@dataclass(frozen=True)
class Row:
    """Token ids and their labels (equal to the id, or -100), both of the same length.

    lengths: of the sequences in it, more than one in a packed row; None is one.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    lengths: tuple[int, ...] | None = None

    @property
    def sequences(self) -> tuple[int, ...]:
        return self.lengths or (len(self.input_ids),)

    @property
    def learned(self) -> int:
        """Labels that are learned; a sequence's first token is predicted from nothing."""
        firsts, at = set(), 0
        for length in self.sequences:
            firsts.add(at)
            at += length
        return sum(t != IGNORED and i not in firsts for i, t in enumerate(self.labels))


@dataclass(frozen=True)
class Prepared:
    """Rows, and how many of them lost their end (and with it their end token) to max_length."""

    rows: tuple[Row, ...]
    cut: int

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def learned(self) -> int:
        return sum(row.learned for row in self.rows)


def rows_of_task(
    task: Task, split: Split, tokenizer: Any, max_length: int, without: Container[str] = ()
) -> Prepared:
    """A row for each example of a split that has a gold answer.

    without: ids of examples that are left out.

    Raises:
        UserError: no example has one, or a row has nothing to learn (says which).
    """
    pairs = [
        (task.prompt(example), gold, f"{task.name} {split} example {example.id}")
        for example in task.examples(split)
        if example.id not in without and (gold := task.gold(example)) is not None
    ]
    if not pairs:
        raise UserError(f"task {task.name}: no example of the {split} split has a gold answer")
    return prepare(pairs, tokenizer, max_length)


def prepare(pairs: Iterable[tuple[Prompt, str, str]], tokenizer: Any, max_length: int) -> Prepared:
    """Rows of (prompt, completion, place); the place is what an error names.

    Raises:
        UserError: a row has nothing to learn.
    """
    encoder = RowEncoder(tokenizer)
    rows, cut = [], 0
    for number, (prompt, completion, place) in enumerate(pairs, 1):
        whole = encoder.encode(prompt, completion)
        row = Row(whole.input_ids[:max_length], whole.labels[:max_length])
        if not completion.strip() or not row.learned:
            prompted = sum(label == IGNORED for label in whole.labels)
            why = (
                "its completion is empty"
                if not completion.strip()
                else f"its prompt alone has {prompted} tokens and training.max_length is "
                f"{max_length}; raise it, or leave the row out"
            )
            raise UserError(f"row {number} ({place}) has nothing to learn: {why}")
        cut += len(whole.input_ids) > max_length
        rows.append(row)
    return Prepared(tuple(rows), cut)


class RowEncoder:
    """Encodes a prompt as the engines do, and behind it the completion and the end token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._prompts = PromptEncoder(tokenizer)

    def encode(self, prompt: Prompt, completion: str) -> Row:
        """The whole row, however long. A prompt that is empty text learns the text alone."""
        before = self._prompts.encode(prompt)
        after = None
        if not isinstance(prompt, str):
            after = self._turn(list(prompt), completion, before)
        if after is None:
            after = self._plain(completion)
        labels = (IGNORED,) * len(before) + tuple(after)
        return Row(tuple(before) + tuple(after), labels)

    def _turn(
        self, messages: list[Message], completion: str, before: Sequence[int]
    ) -> list[int] | None:
        """The completion as the chat template writes it; None where it does not go on from the
        prompt's tokens (a template that drops or merges text)."""
        encoded = self._tokenizer.apply_chat_template(
            [*messages, Message(role="assistant", content=completion)],
            tokenize=True,
            return_dict=True,
        )
        ids = list(encoded["input_ids"])
        if ids[: len(before)] != list(before) or len(ids) == len(before):
            return None
        return self._ended(ids[len(before) :])

    def _plain(self, text: str) -> list[int]:
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        bos = self._tokenizer.bos_token_id
        if bos is not None and ids[:1] == [bos]:
            ids = ids[1:]
        return self._ended(ids)

    def _ended(self, ids: list[int]) -> list[int]:
        """The ids with one end token last: templates write a newline behind it, where no model
        is ever asked to go on."""
        eos = self._tokenizer.eos_token_id
        if eos is None:
            return ids
        last = max((i for i, token in enumerate(ids) if token == eos), default=None)
        if last is not None and not self._tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
        return [*ids, eos]


def pack(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Rows put together, in order, each into the first packed row that still has room.

    What shares a row does not see each other in training: `lengths` keeps the borders.
    """
    bins: list[list[Row]] = []
    room: list[int] = []
    for row in rows:
        size = len(row.input_ids)
        at = next((i for i, free in enumerate(room) if free >= size), None)
        if at is None:
            bins.append([])
            room.append(max_length)
            at = len(bins) - 1
        bins[at].append(row)
        room[at] -= size
    return [
        Row(
            tuple(token for row in group for token in row.input_ids),
            tuple(label for row in group for label in row.labels),
            tuple(length for row in group for length in row.sequences),
        )
        for group in bins
    ]
