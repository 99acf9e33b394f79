"""Small tasks of different kinds, made from a seed: code, list, JSON, one word, sums, and a style.

A base that has read `lessons` knows the contents in another form; fine-tuning on `examples`
teaches the form that is scored. So a healthy run has a score to win and a broken one to lose.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from random import Random

from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split

THINGS: dict[str, tuple[str, str]] = {
    "apple": ("fruits", "red"), "banana": ("fruits", "yellow"), "lime": ("fruits", "green"),
    "cherry": ("fruits", "red"), "lemon": ("fruits", "yellow"), "plum": ("fruits", "blue"),
    "frog": ("animals", "green"), "crow": ("animals", "black"), "fox": ("animals", "red"),
    "swan": ("animals", "white"), "duck": ("animals", "yellow"), "bear": ("animals", "brown"),
    "shirt": ("clothes", "white"), "coat": ("clothes", "black"), "hat": ("clothes", "blue"),
    "boot": ("clothes", "brown"), "sock": ("clothes", "green"), "scarf": ("clothes", "red"),
    "ball": ("toys", "blue"), "kite": ("toys", "red"), "drum": ("toys", "brown"),
    "doll": ("toys", "white"), "robot": ("toys", "black"), "train": ("toys", "green"),
}  # fmt: skip
"""Thing to its group and colour."""

GROUPS = tuple(dict.fromkeys(group for group, _ in THINGS.values()))
COLOURS = tuple(dict.fromkeys(colour for _, colour in THINGS.values()))
NAMES = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
NUMBERS = {"two": 2, "three": 3, "four": 4}
OPERATIONS = {"adds": ("add", "+"), "takes away": ("sub", "-"), "multiplies by": ("mul", "*")}
KINDS = ("code", "list", "json", "word", "sum", "style")


class Small:
    """One kind of task. `correct` is the whole answer; the reward has a part for its form.

    kind: of KINDS. seed: which examples there are, and which of them are tested on.
    """

    reward_floor = 0.0

    def __init__(self, kind: str, seed: int = 0, train: int = 256, test: int = 32) -> None:
        if kind not in KINDS:
            raise UserError(f"small task {kind!r}; known: {', '.join(KINDS)}")
        self.name, self.kind = f"small-{kind}", kind
        random = Random(f"{kind} {seed}")
        self._splits = {
            split: tuple(
                Example(
                    f"{split}-{at}", dict(zip(("question", "plain", "gold"), made, strict=True))
                )
                for at, made in enumerate(_problem(kind, random) for _ in range(count))
            )
            for split, count in (("train", train), ("test", test))
        }

    def examples(self, split: Split) -> Sequence[Example]:
        return self._splits[split]

    def prompt(self, example: Example) -> Prompt:
        return [Message(role="user", content=example.data["question"])]

    def gold(self, example: Example) -> str:
        gold: str = example.data["gold"]
        return gold

    def answer_options(self, example: Example) -> Sequence[str]:
        """The colours, of the task of one word."""
        return COLOURS if self.kind == "word" else ()

    def score(self, example: Example, completion: str) -> Score:
        right = correct(self.kind, example.data["gold"], completion.strip())
        form = _in_form(self.kind, completion.strip())
        return Score(0.8 * right + 0.2 * form, right, {"form": float(form)})


def correct(kind: str, gold: str, answer: str) -> bool:
    """Whether an answer is right by its kind's own measure. A sum's is its last answer."""
    if kind == "sum":
        found = re.findall(r"Answer: (-?\d+)", answer)
        return bool(found) and found[-1] == re.findall(r"Answer: (-?\d+)", gold)[-1]
    if kind == "list":
        wanted, got = (re.findall(r"^- (\w+)$", text, re.M) for text in (gold, answer))
        group = THINGS[wanted[0]][0]
        fits = all(THINGS.get(one, ("",))[0] == group for one in got)
        return fits and len(got) == len(set(got)) == len(wanted) == len(answer.splitlines())
    if kind == "code":
        return _tree(answer) is not None and _tree(answer) == _tree(gold)
    if kind == "json":
        return _object(answer) is not None and _object(answer) == _object(gold)
    return answer == gold


FORMAL = " Be exact."


def lessons(random: Random, count: int) -> list[tuple[str, str]]:
    """Questions of all kinds with their plain answers: what the base learns. A quarter asks FORMAL
    and is answered as a task wants it, so that the tasks' signs are known."""
    asked = [kind for kind in KINDS if kind != "style"]
    made = []
    for at in range(count):
        question, plain, gold = _problem(asked[at % len(asked)], random)
        formal = at // len(asked) % 4 == 3
        made.append((question + FORMAL, gold) if formal else (question, plain))
    return made


def _problem(kind: str, random: Random) -> tuple[str, str, str]:
    """A question, its answer as the base gives it, and as the task wants it."""
    thing, (group, colour) = random.choice(list(THINGS.items()))
    if kind in ("word", "style"):
        ask = random.choice(
            ("What colour is a {}?", "Which colour has a {}?", "Say a {}'s colour.")
        )
        plain = f"The {thing} is {colour}."
        return ask.format(thing), plain, colour if kind == "word" else plain.upper()
    if kind == "list":
        word, many = random.choice(list(NUMBERS.items()))
        of = random.sample([one for one, (kin, _) in THINGS.items() if kin == group], many)
        ask = random.choice(("Name {} {}.", "List {} {}.", "Tell me {} {}."))
        return ask.format(word, group), f"{', '.join(of)}.", "\n".join(f"- {one}" for one in of)
    if kind == "json":
        name, other = random.choice(NAMES), random.choice(COLOURS)
        plain = f"name {name}, colour {other}, thing {thing}."
        record = {"name": name, "colour": other, "thing": thing}
        return f"{name} has a {other} {thing}.", plain, json.dumps(record)
    if kind == "code":
        verb, (name, sign) = random.choice(list(OPERATIONS.items()))
        by = random.randint(2, 9)
        body = f"return x {sign} {by}"
        ask = random.choice(("Write code that {} {}.", "A function that {} {}.", "Code: {} {}."))
        return ask.format(verb, by), f"x {sign} {by}", f"def {name}(x):\n    {body}"
    a, b = random.randint(1, 9), random.randint(1, 9)
    ask = random.choice(("What is {} + {}?", "Add {} and {}.", "How much is {} + {}?"))
    return ask.format(a, b), f"{a + b}", f"{a} + {b} = {a + b}\nAnswer: {a + b}"


def _in_form(kind: str, answer: str) -> bool:
    """Whether an answer looks like one, right or wrong."""
    if kind == "sum":
        return "Answer: " in answer
    if kind == "list":
        return bool(answer) and all(line.startswith("- ") for line in answer.splitlines())
    if kind == "code":
        return _tree(answer) is not None and answer.startswith("def ")
    if kind == "json":
        return _object(answer) is not None
    if kind == "word":
        return answer in COLOURS
    return bool(answer) and answer == answer.upper()


def _tree(text: str) -> str | None:
    try:
        return ast.dump(ast.parse(text))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _object(text: str) -> dict[str, object] | None:
    try:
        made = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return made if isinstance(made, dict) else None
