"""What a task is: one object that gives prompts, scores completions and knows its gold answers.

A task is pure Python: it never imports torch, so that scoring can run in worker processes
and `loralab tasks` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

Split = Literal["train", "test"]


class Message(TypedDict):
    """One turn of a chat, as chat templates take it."""

    role: str
    content: str


def is_message(turn: Any) -> bool:
    """Whether a value from a file is a turn of a chat."""
    return (
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
    )


Prompt = str | Sequence[Message]
"""Plain text is continued as it stands; messages go through the model's chat template."""


@dataclass(frozen=True)
class Example:
    """One problem. `data` holds whatever the task needs to prompt and score."""

    id: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """Judgement of one completion.

    reward: what training maximises (any finite float).
    correct: whether the answer is right by the task's own measure, apart from the reward;
        None where the task has no such notion.
    parts: the named terms that make up the reward, for logs.
    """

    reward: float
    correct: bool | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """Reward, metric, data and probe in one object.

    `score` sees the completion alone, never prompt + completion: the prompt of Countdown holds
    an answer tag that would earn reward by itself. `reward_floor` is what a completion gets that
    could not be scored.
    """

    name: str
    reward_floor: float

    def examples(self, split: Split) -> Sequence[Example]:
        """The fixed, ordered examples of a split."""
        ...

    def prompt(self, example: Example) -> Prompt:
        """What the model is given."""
        ...

    def score(self, example: Example, completion: str) -> Score:
        """Judge one completion. Bounded in time, never raises on model text."""
        ...

    def gold(self, example: Example) -> str | None:
        """A completion that scores full marks, or None if the example has none."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A task with numbers of its own over many completions, such as F1, which no mean of scores
    gives."""

    def metrics(self, answered: Sequence[tuple[Example, str]]) -> Mapping[str, float]:
        """Of examples and what was answered to each."""
        ...


@runtime_checkable
class Optioned(Protocol):
    """A task whose answer is one of a few words that its prompt may list."""

    def answer_options(self, example: Example) -> Sequence[str]:
        """The words, as an answer would name them."""
        ...


@runtime_checkable
class Labelled(Protocol):
    """A task whose examples are texts of a few classes: what a classifier is trained on."""

    classes: Sequence[str]

    def text(self, example: Example) -> str:
        """The text alone, without instructions."""
        ...

    def label(self, example: Example) -> int:
        """The index of its class."""
        ...


@runtime_checkable
class Continuous(Protocol):
    """A task that is one text: perplexity is measured on it."""

    def whole(self, split: Split) -> str:
        """All text of a split."""
        ...
