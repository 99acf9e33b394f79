"""Conciseness: answer a question at the length of a short target.

The reward is -|len(completion) - len(target)| in characters, of the completion alone, as in
Evolution Strategies at Scale (Qiu et al., arXiv:2509.24372). It reads length only, so answers
may become short and wrong under it: `correct` stands beside it and is no part of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from loralab.data.sources import Row
from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split
from loralab.tasks.splits import draw_shots, rows_of_split, text_field

_MOST_SHOTS = 32


class _Question(NamedTuple):
    question: str
    target: str
    aliases: tuple[str, ...] = ()


_QUESTIONS: dict[Split, tuple[_Question, ...]] = {
    "train": (
        _Question("Who wrote Romeo and Juliet?", "Shakespeare"),
        _Question("What causes the tides?", "The Moon", ("Moon", "lunar gravity")),
    ),
    "test": (
        _Question("What is frozen water called?", "Ice"),
        _Question("What is the chemical symbol for gold?", "Au"),
        _Question("What is the opposite of hot?", "Cold"),
        _Question(
            "What is the boiling point of water in degrees Celsius?",
            "100",
            ("hundred", "one hundred"),
        ),
        _Question("How many legs does a spider have?", "Eight", ("8",)),
        _Question("Which organ pumps blood through the body?", "Heart"),
        _Question("What is the largest planet in the solar system?", "Jupiter"),
        _Question("What color is a ripe banana?", "Yellow"),
    ),
}


class Conciseness:
    """Two questions to train on and eight to test on, each a user message.

    `correct` is whether the target, or another accepted form of it, stands in the completion as
    whole words, whatever its case.

    path: other questions, from a folder with files named train... and test..., one such file, or a
        hub name; rows hold `question`, `target` and maybe `aliases`, a list.
    shots: training questions with their targets, as turns before the question; seed: which.
    """

    name = "conciseness"
    # Text that could not be scored must not pass for a short answer.
    reward_floor = -1000.0
    full_marks = 0.0

    def __init__(self, *, path: str | None = None, shots: int = 0, seed: int = 0) -> None:
        if not 0 <= shots <= _MOST_SHOTS:
            raise UserError(f"conciseness: shots is {shots}, expected 0 to {_MOST_SHOTS}")
        self.path = path
        self.shots = shots
        self.seed = seed
        self._read: dict[Split, list[Example]] = {}

    def examples(self, split: Split) -> Sequence[Example]:
        """The questions of a split: data holds `question`, `target` and `aliases`."""
        if split not in self._read:
            questions: Sequence[_Question] = _QUESTIONS[split]
            if self.path is not None:
                questions = [_question(row) for row in rows_of_split(self.path, split)]
            self._read[split] = [
                Example(f"{split}-{number}", question._asdict())
                for number, question in enumerate(questions)
            ]
        return self._read[split]

    def prompt(self, example: Example) -> Prompt:
        """The question alone, with no word about length, behind the shots. An example is never its
        own shot."""
        shown = [shot for shot in self._drawn if shot.id != example.id][: self.shots]
        turns = []
        for shot in shown:
            turns.append(Message(role="user", content=shot.data["question"]))
            turns.append(Message(role="assistant", content=shot.data["target"]))
        return [*turns, Message(role="user", content=example.data["question"])]

    def score(self, example: Example, completion: str) -> Score:
        """Minus the difference of lengths in characters, and whether the answer is in it."""
        target: str = example.data["target"]
        distance = abs(len(completion) - len(target))
        correct = mentions(completion, (target, *example.data.get("aliases", ())))
        return Score(-float(distance), correct, {"length": -float(distance)})

    def gold(self, example: Example) -> str | None:
        """The target itself."""
        target: Any = example.data["target"]
        return str(target)

    @cached_property
    def _drawn(self) -> list[Example]:
        train = self.examples("train") if self.shots else []
        return draw_shots(self.name, train, self.shots, self.seed, self.path)


def _question(row: Row) -> _Question:
    aliases = row.data.get("aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise UserError(f"{row.place}: `aliases` is {aliases!r}, expected a list of text")
    return _Question(text_field(row, "question"), text_field(row, "target"), tuple(aliases))


def mentions(text: str, phrases: Sequence[str]) -> bool:
    """Whether one of the phrases stands in the text as whole words, whatever its case."""
    pattern = "|".join(re.escape(phrase) for phrase in phrases)
    return re.search(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE) is not None
