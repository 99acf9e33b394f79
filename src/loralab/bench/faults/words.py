"""The words of the small tasks, in two parts that share none: what limits are set on, and the rest.

Things, groups, colours, names, numbers, operations and ways to ask of the unseen part never stand
in a row, a test or a prompt of the development part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Part = Literal["development", "unseen"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Words:
    """things: to group and colour. many: words for how many to list. operations: what is said of
    code, to the function's name and sign. asks: ways to ask by kind, with the same fields."""

    things: dict[str, tuple[str, str]]
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    many: dict[str, int]
    operations: dict[str, tuple[str, str]]
    asks: dict[str, tuple[str, ...]]

    @property
    def colours(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(colour for _, colour in self.things.values()))


def _things(table: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Of group to "thing colour, thing colour"."""
    made = {}
    for group, row in table.items():
        for pair in row.split(", "):
            thing, colour = pair.split()
            made[thing] = group, colour
    return made


DEVELOPMENT = Words(
    things=_things({
        "fruits": "apple red, banana yellow, lime green, cherry red, lemon yellow, plum blue, "
                  "melon green",
        "animals": "frog green, crow black, fox red, swan white, duck yellow, sheep white, "
                   "cat black",
        "clothes": "shirt white, coat black, hat blue, sock green, scarf red, dress blue, "
                   "glove yellow",
        "toys": "ball blue, kite red, doll white, robot black, drum yellow, puzzle green, "
                "block white",
        "tools": "hammer black, saw yellow, rake green, spade blue, axe red, brush white, "
                 "ladder yellow",
        "dishes": "cup white, bowl blue, plate green, spoon black, fork yellow, pan black, jug red",
    }),
    names=("Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Sue", "Tim", "Amy"),
    numbers=tuple(range(1, 40, 2)),
    many={"two": 2, "four": 4},
    operations={"adds": ("add", "+"), "takes away": ("sub", "-"), "multiplies by": ("mul", "*"),
                "keeps the rest of": ("rest", "%")},
    asks={
        "code": ("Write code that {} {}.", "A function that {} {}.", "Code: {} {}.",
                 "I need a function that {} {}."),
        "list": ("Name {} {}, {} first.", "List {} {}, {} first.", "Tell me {} {}, {} first.",
                 "Which {} {} are there, {} first?"),
        "json": ('For "{}": "{}", "{}".', 'Of "{}" note "{}", "{}".', 'Keep "{}", "{}", "{}".',
                 'Record "{}", "{}", "{}".'),
        "word": ("What colour is {}'s {}?", "Which colour has {}'s {}?", "How does {}'s {} look?",
                 "Tell me the colour of {}'s {}."),
        "sum": ("What is {} + {}?", "Add {} and {}.", "How much is {} + {}?", "{} plus {}?"),
    },
)  # fmt: skip

UNSEEN = Words(
    things=_things({
        "vegetables": "carrot orange, onion golden, turnip purple, radish pink, potato brown, "
                      "beet purple, pumpkin orange",
        "bugs": "ant brown, bee golden, moth grey, wasp orange, beetle purple, worm pink, fly grey",
        "vehicles": "car grey, bus orange, truck brown, bike pink, tram purple, plane grey, "
                    "boat brown",
        "furniture": "chair brown, table grey, bed pink, lamp golden, desk orange, shelf purple, "
                     "couch brown",
        "instruments": "bell golden, flute grey, horn orange, guitar brown, violin purple, "
                       "piano pink, harp golden",
        "flowers": "rose pink, tulip purple, poppy orange, orchid grey, daisy golden, peony pink, "
                   "violet purple",
    }),
    names=("Jack", "Lucy", "Leo", "Emma", "Dan", "Kate", "Paul", "Nina", "Rob", "Ella"),
    numbers=tuple(range(2, 41, 2)),
    many={"three": 3, "five": 5},
    operations={"divides by": ("div", "/"), "equals": ("same", "=="), "exceeds": ("above", ">"),
                "is under": ("under", "<")},
    asks={
        "code": ("Program what {} {}.", "Make a routine: {} {}.", "In Python, what {} {}?",
                 "Please program: {} {}."),
        "list": ("Give {} {} from {} on.", "Write down {} {} from {} on.",
                 "Let me have {} {} from {} on.", "Count up {} {} from {} on."),
        "json": ('Store "{}" / "{}" / "{}".', 'Here: "{}" / "{}" / "{}".',
                 'Entry "{}" / "{}" / "{}".', 'Object "{}" / "{}" / "{}".'),
        "word": ("How is {}'s {} painted?", "{}'s {}: its colour?", "Of which colour was {}'s {}?",
                 "Guess how {}'s {} looks."),
        "sum": ("Find {} + {}.", "Give the sum of {} and {}.", "Put {} and {} together.",
                "{} and {} make what?"),
        "opposite": ("What is the opposite of {}?", "Turn {} into its contrary.", "Not {}, but?",
                     "The contrary of {}?"),
        "row": ("{} ordered {} of {}, {}.", "{} counted {} of {}, {}.", "{} packed {} of {}, {}.",
                "{} stored {} of {}, {}."),
        "reverse": ("Turn round: {}, {}, {}.", "Backwards: {}, {}, {}.", "From behind: {}, {}, {}.",
                    "Last one first: {}, {}, {}."),
    },
)  # fmt: skip

BY_PART: dict[Part, Words] = {"development": DEVELOPMENT, "unseen": UNSEEN}
THINGS = DEVELOPMENT.things | UNSEEN.things
COLOURS = (*DEVELOPMENT.colours, *UNSEEN.colours)

_OPPOSITES = """
big small, hot cold, up down, in out, day night, happy sad, fast slow, hard soft, old young,
long short, full empty, wet dry, high low, early late, good bad, rich poor, strong weak, open shut,
light dark, near far, thick thin, loud quiet, clean dirty, sweet sour, left right, push pull,
give take, win lose, start stop, come go, laugh cry, awake asleep, brave afraid, true false,
wide narrow, deep shallow, first last, more less, above below, kind mean
"""
OPPOSITES = tuple(tuple(pair.split()) for pair in _OPPOSITES.split(","))
"""Pairs, of the unseen part alone."""
