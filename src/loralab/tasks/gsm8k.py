"""GSM8K: grade-school word problems with one number as the answer (arXiv:2110.14168).

The reward is 1 for the right number and 0 otherwise. The number read is the one behind the last
"####", as the gold solutions write it, else the last number in the text. "$1,234.50", "72.",
"72.0" and "50%" are read as the numbers they are.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split
from loralab.tasks.splits import rows_of_split, text_field

MARK = "####"
INSTRUCTIONS = (
    "Solve the problem step by step. Then write the answer on a last line of its own, as a number "
    f'after "{MARK}".'
)

_CALCULATION = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"[-−]?\s?\$?\s?(?:[0-9][0-9,]{0,60}(?:\.[0-9]{1,30})?|\.[0-9]{1,30})")
_AGAIN = re.compile(r"\n\s*(?:Question|Problem):")
_LONGEST = 20_000
"""Characters of a completion that are read, from its end."""


class GSM8K:
    """The problems of a folder or of the hub, with the answers' calculator marks taken out.

    path: a folder with files named train... and test..., rows of `question` and `answer`; or a hub
        name.
    shots: solved training problems in each prompt, the same ones for all (seeded).
    style: "chat" is one user message, "plain" is text to be continued behind "Answer:".
    examples: at most this many of each split, the first ones.
    """

    name = "gsm8k"
    reward_floor = 0.0
    full_marks = 1.0

    def __init__(
        self,
        *,
        path: str = "openai/gsm8k",
        shots: int = 0,
        style: Literal["chat", "plain"] = "chat",
        examples: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= shots <= 32:
            raise UserError(f"gsm8k: shots is {shots}, expected 0 to 32")
        if examples is not None and examples < 1:
            raise UserError(f"gsm8k: examples is {examples}, expected 1 or more")
        self.path = path
        self.shots = shots
        self.style = style
        self.count = examples
        self.seed = seed
        self._read: dict[Split, list[Example]] = {}

    def examples(self, split: Split) -> Sequence[Example]:
        """Data holds `question`, `solution` (without calculator marks) and `answer`."""
        return self._all(split)[: self.count]

    def prompt(self, example: Example) -> Prompt:
        """The instructions, the shots and the problem. An example is never its own shot."""
        shown = [shot for shot in self._shots if shot.id != example.id][: self.shots]
        question = str(example.data["question"])
        if self.style == "plain":
            solved = [
                f"Question: {s.data['question']}\nAnswer: {s.data['solution']}" for s in shown
            ]
            return "\n\n".join([*solved, f"Question: {question}\nAnswer:"])
        solved = [f"Problem: {s.data['question']}\n\n{s.data['solution']}" for s in shown]
        last = f"Problem: {question}" if shown else question
        return [Message(role="user", content="\n\n".join([INSTRUCTIONS, *solved, last]))]

    def score(self, example: Example, completion: str) -> Score:
        """1 for the right number, else 0. parts: `answer`, and whether it was marked with ####
        (which is worth nothing)."""
        own = _own_words(example, completion)
        right = final_number(own) == example.data["answer"]
        return Score(float(right), right, {"answer": float(right), "marked": float(MARK in own)})

    def answer(self, example: Example, completion: str) -> str | None:
        """The final number, to vote by."""
        return final_number(_own_words(example, completion))

    def gold(self, example: Example) -> str | None:
        """The solution, calculator marks taken out, ending in "#### 72"."""
        solution = str(example.data["solution"])
        # In plain style it stands right behind "Answer:".
        return f" {solution}" if self.style == "plain" else solution

    @cached_property
    def _shots(self) -> list[Example]:
        if not self.shots:
            return []
        train = self._all("train")
        wanted = min(self.shots + 1, len(train))  # one to spare, for the example that is a shot
        return random.Random(self.seed).sample(train, wanted)

    def _all(self, split: Split) -> list[Example]:
        if split not in self._read:
            rows = rows_of_split(self.path, split, subset="main")
            if not rows:
                raise UserError(f"gsm8k: {self.path} holds no {split} file")
            self._read[split] = [
                _example(
                    f"{split}-{number}",
                    text_field(row, "question"),
                    text_field(row, "answer"),
                    row.place,
                )
                for number, row in enumerate(rows)
            ]
        return self._read[split]


def _own_words(example: Example, completion: str) -> str:
    """A copied problem is no answer, though its last number may happen to be the right one."""
    own = completion[-_LONGEST:].rpartition(str(example.data["question"]))[2]
    return _AGAIN.split(own, maxsplit=1)[0]


def final_number(text: str) -> str | None:
    """The number behind the last "####", else the last one, in a form that compares: "1234.5"."""
    marked = text.rpartition(MARK)
    if marked[1]:
        found = _NUMBER.search(marked[2])
        return None if found is None else _plain(found.group())
    last = None
    for found in _NUMBER.finditer(text):
        last = found
    return None if last is None else _plain(last.group())


def _plain(number: str) -> str:
    digits = re.sub(r"[$,\s]", "", number).replace("−", "-")
    whole, point, part = digits.lstrip("-").partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    value = f"{whole}.{part}" if point and part else whole
    return f"-{value}" if digits.startswith("-") and value != "0" else value


def _example(identity: str, question: str, answer: str, place: str) -> Example:
    solution = _CALCULATION.sub("", answer).strip()
    number = final_number(solution) if MARK in solution else None
    if number is None:
        raise UserError(f'{place}: `answer` holds no "{MARK}" with a number behind it')
    return Example(identity, {"question": question, "solution": solution, "answer": number})
