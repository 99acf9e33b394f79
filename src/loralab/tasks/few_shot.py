"""What tasks with a train and a test file share: reading them once, and shots from the first."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from loralab.data.sources import Row
from loralab.errors import UserError
from loralab.tasks.base import Example, Split
from loralab.tasks.splits import rows_of_split


class FewShot(ABC):
    """The examples of a folder or of the hub.

    path: a folder with files named train... and test..., one such file, or a hub name. None is the
        task's own.
    shots: solved training examples in each prompt, the same ones for all (seeded).
    style: "chat" is one user message, "plain" is text to be continued.
    examples: at most this many of each split, the first ones.
    """

    name: str
    hub: ClassVar[str]
    subset: ClassVar[str | None] = None
    hub_test: ClassVar[str] = "test"
    most_shots: ClassVar[int]
    reward_floor = 0.0
    full_marks = 1.0

    def __init__(
        self,
        *,
        path: str | None = None,
        shots: int = 0,
        style: Literal["chat", "plain"] = "chat",
        examples: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= shots <= self.most_shots:
            raise UserError(f"{self.name}: shots is {shots}, expected 0 to {self.most_shots}")
        if examples is not None and examples < 1:
            raise UserError(f"{self.name}: examples is {examples}, expected 1 or more")
        self.path = self.hub if path is None else path
        self.shots = shots
        self.style = style
        self.count = examples
        self.seed = seed
        self._read: dict[Split, list[Example]] = {}

    def examples(self, split: Split) -> Sequence[Example]:
        """The first `examples` of a split."""
        return self.all(split)[: self.count]

    def all(self, split: Split) -> list[Example]:
        """Every example of a split, read once."""
        if split not in self._read:
            rows = rows_of_split(self.path, split, subset=self.subset, hub_test=self.hub_test)
            if not rows and not Path(self.path).expanduser().is_file():
                raise UserError(f"{self.name}: {self.path} holds no {split} file")
            self._read[split] = self.read(split, rows)
        return self._read[split]

    @abstractmethod
    def read(self, split: Split, rows: Sequence[Row]) -> list[Example]:
        """Rows of a split's files as examples."""

    def shots_for(self, example: Example) -> list[Example]:
        """What its prompt shows. An example is never its own shot."""
        return [shot for shot in self._drawn if shot.id != example.id][: self.shots]

    def draw(self, train: Sequence[Example], drawn: random.Random) -> list[Example]:
        """Shots for every prompt, and one to spare for the example that is a shot itself."""
        return drawn.sample(list(train), min(self.shots + 1, len(train)))

    @cached_property
    def _drawn(self) -> list[Example]:
        if not self.shots:
            return []
        drawn = self.draw(self.all("train"), random.Random(self.seed))
        if len(drawn) < self.shots:
            raise UserError(
                f"{self.name}: shots is {self.shots}, but {self.path} has {len(drawn)} training "
                "examples to show; give a folder with a train file, or fewer shots"
            )
        return drawn

    def behind_prompt(self, text: str) -> str:
        """A gold answer as it stands: plain prompts end in "Answer:", with the space to come."""
        return f" {text}" if self.style == "plain" else text
