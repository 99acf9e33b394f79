"""SST-2: sentences of film reviews, negative or positive (Socher et al. 2013; GLUE's version).

The answer is the class that the completion names; one that names both in a line ("positive or
negative"), or lists them line by line, answers neither. Metrics are accuracy and F1 of "positive".
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from loralab.data.sources import Row
from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split
from loralab.tasks.few_shot import FewShot
from loralab.tasks.metrics import classification
from loralab.tasks.splits import text_field

CLASSES = ("negative", "positive")
INSTRUCTIONS = "Is the sentiment of this film review positive or negative? Answer with one word."

_NAMED = re.compile(rf"(?<!\w)(?:{'|'.join(CLASSES)})(?!\w)")
_BARE = re.compile(rf"\W*(?:{'|'.join(CLASSES)})\W*")
_AGAIN = re.compile(r"\n\s*(?:Review|Sentence):")
_LONGEST = 20_000
"""Characters of a completion that are read."""


class Sentiment(FewShot):
    """The sentences; options as `FewShot`, the classes of the shots in turn.

    Rows and data hold `sentence` and `label` (0 or 1). From the hub, "validation" is our test
    split, as GLUE keeps its test labels.
    """

    name = "sst2"
    hub = "stanfordnlp/sst2"
    hub_test = "validation"
    most_shots = 64
    classes = CLASSES

    def prompt(self, example: Example) -> Prompt:
        """The instructions, the shots and the sentence. An example is never its own shot."""
        shown = self.shots_for(example)
        reviews = [f"Review: {self.text(s)}\nSentiment: {CLASSES[self.label(s)]}" for s in shown]
        text = "\n\n".join([INSTRUCTIONS, *reviews, f"Review: {self.text(example)}\nSentiment:"])
        return text if self.style == "plain" else [Message(role="user", content=text)]

    def score(self, example: Example, completion: str) -> Score:
        """1 for the right class, else 0. parts: `answer`, and whether one class was named."""
        found = self._predicted(example, completion)
        right = found == self.label(example)
        parts = {"answer": float(right), "answered": float(found is not None)}
        return Score(float(right), right, parts)

    def answer(self, example: Example, completion: str) -> str | None:
        """The class that is named, to vote by."""
        found = self._predicted(example, completion)
        return None if found is None else CLASSES[found]

    def answer_options(self, example: Example) -> Sequence[str]:
        """The two classes."""
        return CLASSES

    def gold(self, example: Example) -> str | None:
        """The name of its class."""
        return self.behind_prompt(CLASSES[self.label(example)])

    def metrics(self, answered: Sequence[tuple[Example, str]]) -> Mapping[str, float]:
        """accuracy, f1 (of "positive"), f1_macro; no answer is a wrong one."""
        return classification(
            [self._predicted(example, completion) for example, completion in answered],
            [self.label(example) for example, _ in answered],
        )

    def text(self, example: Example) -> str:
        """The sentence alone."""
        return str(example.data["sentence"])

    def label(self, example: Example) -> int:
        """0 negative, 1 positive."""
        return int(example.data["label"])

    def _predicted(self, example: Example, completion: str) -> int | None:
        # A copied prompt names classes before the sentence, which may name one itself; so may a
        # quoted one, but a word in quotation marks is an answer.
        sentence = re.escape(self.text(example))
        copied = rf"Review: {sentence}(?!\w)"
        if " " in self.text(example):
            copied += rf"|\"{sentence}\"|“{sentence}”"
        own = re.split(copied, completion[:_LONGEST])[-1]
        lines = _AGAIN.split(own, maxsplit=1)[0].lower().split("\n")
        lines = [line for line in lines if line.strip()]
        for number, line in enumerate(lines):
            named = set(_NAMED.findall(line))
            # A class and nothing else, and below it the other: the two are listed.
            if _BARE.fullmatch(line) and _BARE.fullmatch(next(iter(lines[number + 1 :]), "")):
                named |= set(_NAMED.findall(lines[number + 1]))
            if named:
                return CLASSES.index(named.pop()) if len(named) == 1 else None
        return None

    def draw(self, train: Sequence[Example], drawn: random.Random) -> list[Example]:
        """One more of each class than is shown, for the examples that are shots themselves."""
        by_class = []
        for label in range(len(CLASSES)):
            known = [example for example in train if self.label(example) == label]
            by_class.append(drawn.sample(known, min(self.shots // 2 + 2, len(known))))
        return [shot for pair in zip(*by_class, strict=False) for shot in pair]

    def read(self, split: Split, rows: Sequence[Row]) -> list[Example]:
        """Sentence and label of each row."""
        return [_example(f"{split}-{i}", row) for i, row in enumerate(rows)]


def _example(identity: str, row: Row) -> Example:
    sentence = text_field(row, "sentence").strip()
    label = row.data.get("label")
    if label not in (0, 1, "0", "1") or isinstance(label, bool):
        raise UserError(f"{row.place}: `label` is {label!r}, expected 0 or 1")
    return Example(identity, {"sentence": sentence, "label": int(label)})
