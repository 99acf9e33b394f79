"""Small tasks of different kinds, each problem known beforehand: code, lists, sums, a style ...

A base that has read `lessons` knows the contents in another form; fine-tuning on `examples`
teaches the form that is scored. So a healthy run has a score to win and a broken one to lose.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import product
from random import Random

from loralab.bench.faults.words import BY_PART, COLOURS, OPPOSITES, PARTS, THINGS, Part, Words
from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split

KINDS = ("code", "list", "json", "word", "sum", "style", "opposite", "row", "reverse")
ONLY_UNSEEN = ("opposite", "row", "reverse")
"""Kinds of which the development part has no problem."""

TEST_SHARE = 0.2
"""Of the keys whose problems are tested and never trained."""
_DRAWN = 4000
"""Problems of kinds that have many more."""


@dataclass(frozen=True)
class Problem:
    """key: what it is about; another way to ask it, or the same in other order, has the same.
    plain: how the base answers; gold: how the task wants it."""

    key: str
    question: str
    plain: str
    gold: str


class Small:
    """One kind of task. `correct` is the whole answer; the reward has a part for its form.

    part: whose words. seed: which keys are tested, and which of the other problems are trained.
    sign: what stands behind every question.

    Raises:
        UserError: no such kind, or one that the part does not have.
    """

    reward_floor = 0.0

    def __init__(
        self,
        kind: str,
        seed: int = 0,
        train: int = 256,
        test: int = 32,
        part: Part = "development",
        sign: str = "",
    ) -> None:
        known = (*kinds_of(part), "style")
        if kind not in known:
            raise UserError(f"small task {kind!r} of {part}; known: {', '.join(known)}")
        self.name, self.kind, self.sign, self._part = f"small-{kind}", kind, sign, part
        learned, tested = split(kind, part, seed)
        self._splits = {"train": _examples("train", learned[:train]),
                        "test": _examples("test", tested[:test])}  # fmt: skip

    def examples(self, split: Split) -> Sequence[Example]:
        return self._splits[split]

    def prompt(self, example: Example) -> Prompt:
        return [Message(role="user", content=example.data["question"] + self.sign)]

    def gold(self, example: Example) -> str:
        gold: str = example.data["gold"]
        return gold

    def answer_options(self, example: Example) -> Sequence[str]:
        """The colours, of the task of one word."""
        return BY_PART[self._part].colours if self.kind == "word" else ()

    def score(self, example: Example, completion: str) -> Score:
        """0.8 for the right answer, 0.2 for its form; half of that at most for what comes near,
        so that a search has a slope to climb."""
        answer, gold = completion.strip(), example.data["gold"]
        right = correct(self.kind, gold, answer)
        form = 1.0 if _in_form(self.kind, answer) else 0.5 * _nearness(answer, gold)
        return Score(0.8 * right + 0.2 * form, right, {"form": form})


def kinds_of(part: Part) -> tuple[str, ...]:
    """The kinds that a part has problems of, but for the style, which is a change of another."""
    left_out = {"style"} if part == "unseen" else {"style", *ONLY_UNSEEN}
    return tuple(kind for kind in KINDS if kind not in left_out)


def split(kind: str, part: Part, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems to learn and to be tested on, of keys of their own, in an order of the seed; tested
    ones of each key in turn."""
    random = Random(f"{kind} {part} {seed}")
    by_key: dict[str, list[Problem]] = {}
    for one in problems(kind, part):
        by_key.setdefault(one.key, []).append(one)
    keys = random.sample(sorted(by_key), len(by_key))
    held_out = max(1, int(TEST_SHARE * len(keys)))
    for of_key in by_key.values():
        random.shuffle(of_key)
    deep = max(map(len, by_key.values()))
    tested = [by_key[k][at] for at in range(deep) for k in keys[:held_out] if at < len(by_key[k])]
    learned = [one for key in keys[held_out:] for one in by_key[key]]
    random.shuffle(learned)
    return learned, tested


@cache
def problems(kind: str, part: Part) -> tuple[Problem, ...]:
    """Every problem of a kind; of kinds with many, some, the same each time."""
    made = tuple(_MAKERS[kind](BY_PART[part]))
    return made if len(made) <= _DRAWN else tuple(Random(kind).sample(made, _DRAWN))


FORMAL, IN_STYLE = " Be exact.", " Be a pirate."


def lessons(
    random: Random, count: int, parts: Sequence[Part] = PARTS, formal: bool = True
) -> list[tuple[str, str]]:
    """Questions of all kinds with their plain answers: what the base learns. Where `formal`, half
    asks FORMAL, or IN_STYLE, and is answered as a task wants it, so that the tasks' forms are
    known."""
    asked = [(kind, part) for part in parts for kind in kinds_of(part)]
    made = []
    for at in range(count):
        kind, part = asked[at % len(asked)]
        turn = at // len(asked) if formal else 0
        in_style = kind == "word" and turn % 8 == 7
        one = random.choice(problems("style" if in_style else kind, part))
        sign = IN_STYLE if in_style else FORMAL
        made.append((one.question + sign, one.gold) if turn % 2 else (one.question, one.plain))
    return made


def correct(kind: str, gold: str, answer: str) -> bool:
    """Whether an answer is right by its kind's own measure. A sum's is its last answer; a list's
    any of the group, the asked one first."""
    if kind == "sum":
        found = re.findall(r"Answer: (-?\d+)", answer)
        return bool(found) and found[-1] == re.findall(r"Answer: (-?\d+)", gold)[-1]
    if kind == "list":
        wanted, got = (re.findall(r"^- (\w+)$", text, re.M) for text in (gold, answer))
        group = THINGS[wanted[0]][0]
        fits = all(THINGS.get(one, ("",))[0] == group for one in got) and got[:1] == wanted[:1]
        return fits and len(got) == len(set(got)) == len(wanted) == len(answer.splitlines())
    if kind == "code":
        return _tree(answer) is not None and _tree(answer) == _tree(gold)
    if kind == "json":
        return _object(answer) is not None and _object(answer) == _object(gold)
    return answer == gold


def _examples(name: Split, chosen: Sequence[Problem]) -> tuple[Example, ...]:
    return tuple(
        Example(f"{name}-{at}", {"question": p.question, "plain": p.plain, "gold": p.gold})
        for at, p in enumerate(chosen)
    )


def _code(words: Words) -> Iterator[Problem]:
    asks = words.asks["code"]
    for (verb, (name, sign)), by, ask in product(words.operations.items(), words.numbers, asks):
        gold = f"def {name}(x):\n    return x {sign} {by}"
        yield Problem(f"{name} {by}", ask.format(verb, by), f"x {sign} {by}", gold)


def _list(words: Words) -> Iterator[Problem]:
    for (thing, (group, _)), (word, many) in product(words.things.items(), words.many.items()):
        kin = [one for one, (other, _) in words.things.items() if other == group]
        of = [kin[(kin.index(thing) + step) % len(kin)] for step in range(many)]
        for ask in words.asks["list"]:
            question, gold = ask.format(word, group, thing), "\n".join(f"- {one}" for one in of)
            yield Problem(thing, question, f"{', '.join(of)}.", gold)


def _json(words: Words) -> Iterator[Problem]:
    asks = words.asks["json"]
    for name, colour, thing, ask in product(words.names, words.colours, words.things, asks):
        gold = json.dumps({"name": name, "colour": colour, "thing": thing})
        plain = f'name "{name}", colour "{colour}", thing "{thing}".'
        yield Problem(f"{name} {colour} {thing}", ask.format(name, colour, thing), plain, gold)


def _word(words: Words) -> Iterator[Problem]:
    asks = words.asks["word"]
    for (thing, (_, colour)), name, ask in product(words.things.items(), words.names, asks):
        plain = f"{name}'s {thing} is {colour}."
        yield Problem(thing, ask.format(name, thing), plain, colour)


def _style(words: Words) -> Iterator[Problem]:
    for one in _word(words):
        gold = f"Arr, {one.plain[:-1].replace(' is ', ' be ')}, matey!"
        yield Problem(one.key, one.question, one.plain, gold)


def _sum(words: Words) -> Iterator[Problem]:
    few = words.numbers[:10]
    for a, b, ask in product(few, few, words.asks["sum"]):
        gold = f"{a} + {b} = {a + b}\nAnswer: {a + b}"
        yield Problem(f"{min(a, b)} {max(a, b)}", ask.format(a, b), f"{a + b}.", gold)


def _opposite(words: Words) -> Iterator[Problem]:
    for pair, ask in product(OPPOSITES, words.asks["opposite"]):
        for one, other in (pair, pair[::-1]):
            plain = f"{other} is the opposite."
            yield Problem(" ".join(pair), ask.format(one), plain, f"{one} <-> {other}")


def _row(words: Words) -> Iterator[Problem]:
    asks = words.asks["row"]
    for name, count, thing, ask in product(words.names, words.numbers, words.things, asks):
        colour = words.things[thing][1]
        question = ask.format(name, count, thing, colour)
        plain = f"{name}, {thing}, {colour}, {count}."
        gold = f"| {name} | {thing} | {colour} | {count} |"
        yield Problem(f"{name} {count} {thing}", question, plain, gold)


def _reverse(words: Words) -> Iterator[Problem]:
    things, random = list(words.things), Random("reverse")
    for ask in words.asks["reverse"]:
        for _ in range(_DRAWN // len(words.asks["reverse"])):
            of = random.sample(things, 3)
            gold = "\n".join(f"{at}. {one}" for at, one in enumerate(of[::-1], 1))
            yield Problem(" ".join(of), ask.format(*of), f"{', '.join(of[::-1])}.", gold)


_MAKERS = {"code": _code, "list": _list, "json": _json, "word": _word, "sum": _sum,
           "style": _style, "opposite": _opposite, "row": _row, "reverse": _reverse}  # fmt: skip


def _nearness(answer: str, gold: str) -> float:
    """Share of letters in common, in order: 1 of the same text, 0 of an empty one."""
    return SequenceMatcher(None, answer, gold, autojunk=False).ratio()


def _in_form(kind: str, answer: str) -> bool:
    """Whether an answer looks like one, right or wrong."""
    if kind == "sum":
        return "Answer: " in answer
    if kind in ("list", "reverse"):
        mark = r"- \w+" if kind == "list" else r"\d\. \w+"
        return bool(answer) and all(re.fullmatch(mark, line) for line in answer.splitlines())
    if kind == "code":
        return _tree(answer) is not None and answer.startswith("def ")
    if kind == "json":
        return _object(answer) is not None
    if kind == "word":
        return answer in COLOURS
    if kind == "opposite":
        return " <-> " in answer
    if kind == "row":
        return answer.count(" | ") == 3
    return answer.startswith("Arr, ") and answer.endswith("matey!")


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
