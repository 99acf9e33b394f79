"""GSM8K: grade-school word problems with one number as the answer (arXiv:2110.14168).

The reward is 1 for the right number and 0 otherwise. The number read is the one behind the last
"####", as the gold solutions write it, else the last number in the text. "$1,234.50", "72.",
"72.0" and "50%" are read as the numbers they are; "3-4" ends in 4, and "- 18" is 18 in a list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loralab.data.sources import Row
from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split
from loralab.tasks.few_shot import FewShot
from loralab.tasks.splits import text_field

MARK = "####"
INSTRUCTIONS = (
    "Solve the problem step by step. Then write the answer on a last line of its own, as a number "
    f'after "{MARK}".'
)

_CALCULATION = re.compile(r"<<[^<>]*>>")
# A hyphen behind a digit or a word is a range or a subtraction, one before a space begins a line.
_NUMBER = re.compile(
    r"(?:(?<![\w%)])[-−]\$?)?(?:[0-9][0-9,]{0,60}(?:\.[0-9]{1,30})?|\.[0-9]{1,30})"
)
_AGAIN = re.compile(r"\n\s*(?:Question|Problem):")
_LONGEST = 20_000
"""Characters of a completion that are read, from its end."""


class GSM8K(FewShot):
    """The problems, with the answers' calculator marks taken out; options as `FewShot`.

    Rows hold `question` and `answer`; an example's data `question`, `solution` (without calculator
    marks) and `answer`.
    """

    name = "gsm8k"
    hub = "openai/gsm8k"
    subset = "main"
    most_shots = 32

    def prompt(self, example: Example) -> Prompt:
        """The instructions, the shots and the problem. An example is never its own shot."""
        shown = self.shots_for(example)
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
        return self.behind_prompt(str(example.data["solution"]))

    def read(self, split: Split, rows: Sequence[Row]) -> list[Example]:
        """Question, solution and answer of each row."""
        return [
            _example(
                f"{split}-{number}",
                text_field(row, "question"),
                text_field(row, "answer"),
                row.place,
            )
            for number, row in enumerate(rows)
        ]


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
