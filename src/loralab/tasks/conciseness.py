"""Conciseness: answer a question at the length of a short target.

The reward is -|len(completion) - len(target)| in characters, of the completion alone, as in
Evolution Strategies at Scale (Qiu et al., arXiv:2509.24372). It reads length only, so answers
may become short and wrong under it: `correct` stands beside it and is no part of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from loralab.tasks.base import Example, Message, Prompt, Score, Split


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
    """Two questions to train on and eight to test on, each a single user message.

    `correct` is whether the target, or another accepted form of it, stands in the completion as
    whole words, whatever its case.
    """

    name = "conciseness"
    # Text that could not be scored must not pass for a short answer.
    reward_floor = -1000.0
    full_marks = 0.0

    def examples(self, split: Split) -> Sequence[Example]:
        """The questions of a split: data holds `question`, `target` and `aliases`."""
        return [
            Example(f"{split}-{number}", question._asdict())
            for number, question in enumerate(_QUESTIONS[split])
        ]

    def prompt(self, example: Example) -> Prompt:
        """The question alone, with no word about length."""
        return [Message(role="user", content=example.data["question"])]

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


def mentions(text: str, phrases: Sequence[str]) -> bool:
    """Whether one of the phrases stands in the text as whole words, whatever its case."""
    pattern = "|".join(re.escape(phrase) for phrase in phrases)
    return re.search(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE) is not None
