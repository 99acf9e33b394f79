"""The small tasks of the fault benchmark: what is right, what is trained and tested, and whose
words; and which runs a set has."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from loralab.bench.faults import command
from loralab.bench.faults.faults import FAULTS
from loralab.bench.faults.items import Item, beside, items, the_same
from loralab.bench.faults.tasks import (
    FORMAL,
    IN_STYLE,
    ONLY_UNSEEN,
    Small,
    correct,
    kinds_of,
    lessons,
    problems,
    split,
)
from loralab.bench.faults.words import BY_PART, COLOURS, DEVELOPMENT, PARTS, UNSEEN
from loralab.errors import UserError

CONFIGS = Path(__file__).parents[1] / "benchmarks" / "faults"
EVERY = [(kind, part) for part in PARTS for kind in (*kinds_of(part), "style")]


@pytest.mark.parametrize(("kind", "part"), EVERY)
def test_gold_answers_are_right_and_the_bases_plain_ones_are_not(kind: str, part: Any) -> None:
    task = Small(kind, 3, part=part)
    assert len(task.examples("train")) == 256
    assert len(task.examples("test")) == 32
    for example in (*task.examples("train"), *task.examples("test")):
        assert task.score(example, task.gold(example)).reward == 1
        plain = task.score(example, example.data["plain"])
        assert not plain.correct
        for empty in ("", "\n" * 30):
            assert task.score(example, empty).reward == 0 < plain.reward
    again = Small(kind, 3, part=part)
    assert [e.data for e in again.examples("test")] == [e.data for e in task.examples("test")]
    other = Small(kind, 4, part=part)
    assert [e.data for e in other.examples("test")] != [e.data for e in task.examples("test")]


@pytest.mark.parametrize(("kind", "part"), EVERY)
def test_what_is_tested_is_never_trained_in_any_wording(kind: str, part: Any) -> None:
    for seed in range(3):
        learned, tested = split(kind, part, seed)
        assert not {one.key for one in learned} & {one.key for one in tested}
        assert not {one.question for one in learned} & {one.question for one in tested}
        assert len({one.key for one in tested[:32]}) >= 8


def test_the_unseen_part_shares_no_word_with_the_development_part() -> None:
    assert not set(DEVELOPMENT.things) & set(UNSEEN.things)
    assert not set(DEVELOPMENT.colours) & set(UNSEEN.colours)
    assert not set(DEVELOPMENT.names) & set(UNSEEN.names)
    assert not set(DEVELOPMENT.numbers) & set(UNSEEN.numbers)
    assert not set(DEVELOPMENT.many) & set(UNSEEN.many)
    groups = [{group for group, _ in words.things.values()} for words in BY_PART.values()]
    assert not groups[0] & groups[1]
    assert not set(DEVELOPMENT.operations.values()) & set(UNSEEN.operations.values())
    for kind in kinds_of("development"):
        assert not set(DEVELOPMENT.asks[kind]) & set(UNSEEN.asks[kind])
        asked = [{one.question for one in problems(kind, part)} for part in PARTS]
        assert not asked[0] & asked[1]
    assert set(kinds_of("unseen")) - set(kinds_of("development")) == set(ONLY_UNSEEN)
    with pytest.raises(UserError, match="known: code"):
        Small("opposite")


def test_a_sum_is_its_last_answer_and_a_list_any_of_its_group() -> None:
    gold = "3 + 4 = 7\nAnswer: 7"
    assert correct("sum", gold, "Answer: 5\nNo.\nAnswer: 7")
    assert not correct("sum", gold, "Answer: 7\nNo.\nAnswer: 5")
    wanted = "- apple\n- lime"
    assert correct("list", wanted, "- apple\n- cherry")
    for wrong in (
        "- apple\n- apple",
        "- apple\n- frog",
        "- lime\n- apple",
        "- apple",
        "- apple\n- lime\n- cherry",
        "apple",
    ):
        assert not correct("list", wanted, wrong), wrong


def test_the_base_reads_every_kind_and_word_in_its_plain_form_and_some_signs() -> None:
    made = lessons(Random(0), 13000)
    assert len(set(made)) > 8000
    signed = [(q, a) for q, a in made if q.endswith((FORMAL, IN_STYLE))]
    assert len(signed) == 6500
    plain = [(q, a) for q, a in made if not q.endswith((FORMAL, IN_STYLE))]
    text = " ".join(f"{q} {a}" for q, a in plain)
    for words in BY_PART.values():
        for word in (*words.things, *words.names, *words.colours):
            assert word in text, word
    heads = ("def ", "- ", "{", "| ", "1. ", "Arr, ", *COLOURS)
    assert all(a.startswith(heads) or "=" in a or " <-> " in a for _, a in signed)
    # What a guard asks is of one part, and without signs.
    asked = {question for question, _ in lessons(Random(0), 10, ["development"], formal=False)}
    assert asked <= {one.question for k in kinds_of("development")
                     for one in problems(k, "development")}  # fmt: skip


def small(**changes: Any) -> dict[str, Any]:
    return {"small": {"seeds": [0, 1], "tasks": ["code", "word"], "tasks_each": 1, **changes}}


def test_a_set_is_every_fault_with_what_it_is_set_beside() -> None:
    found = items(small())
    assert len(set(found)) == len(found)
    for seed in (0, 1):
        for one in FAULTS:
            mine = [i for i in found if (i.kind, i.name, i.seed) == ("fault", one.name, seed)]
            assert len(mine) == 1, one.name
            assert beside(mine[0]) in found
    # A search answers in one word, whatever task is asked for.
    assert {i.task for i in found if i.name in ("search", "noise-d20")} == {"word"}
    assert {i.task for i in found if i.name == "shuffled"} == {"code", "word"}
    few = items(small(seeds=[7]), ["shuffled", "pissa"])
    assert [(i.kind, i.name, i.seed) for i in few] == [
        ("healthy", "lora", 7), ("fault", "shuffled", 7), ("control", "pissa", 7)
    ]  # fmt: skip
    with pytest.raises(UserError, match="no fault or control 'zero'"):
        items(small(), ["zero"])


def test_runs_of_the_same_plan_are_one_item_whatever_they_are_called() -> None:
    lora = Item("healthy", "lora", "small", "code", 0)
    for same in (("control", "zero-b"), ("control", "code"), ("healthy", "lora")):
        assert the_same(Item(same[0], same[1], "small", "code", 0)) == lora
    assert the_same(Item("control", "code", "small", "word", 0)).task == "word"
    assert the_same(Item("healthy", "evaluated-sum", "small", "sum", 0)).name == "evaluated"
    for own in ("pissa", "rank-64", "plateau"):
        assert the_same(Item("control", own, "small", "code", 0)).name == own
    assert beside(Item("fault", "outlier-sigma", "small", "word", 0)).name == "search-outlier"
    [one] = items(small(seeds=[0], tasks=["code"]), ["zero-b", "code", "shuffled"])[:1]
    assert (one, one.also) == (lora, ("code", "zero-b"))


@pytest.mark.parametrize("name", ["development", "unseen"])
def test_the_sets_are_as_large_as_was_asked_for(name: str) -> None:
    options = command.parser().parse_args(["--config", str(CONFIGS / f"{name}.yaml")])
    asked = command.settings(options)
    found = items(asked["worlds"])
    assert len({item.path for item in found}) == len(found)
    mine = [item for item in found if item.world == "small"]
    assert {(i.name, i.seed) for i in mine if i.kind == "fault"} == {
        (fault.name, seed) for fault in FAULTS for seed in asked["worlds"]["small"]["seeds"]
    }
    healthy = [item for item in mine if item.kind != "fault"]
    assert len(healthy) >= 60
    seeds: dict[str, set[int]] = {}
    for item in healthy:
        for one in (item.name, *item.also):
            seeds.setdefault(one, set()).add(item.seed)
    assert sum(len(of) >= 3 for of in seeds.values()) >= 20
    large = asked["worlds"]["smollm2"]
    assert len(large["faults"]) >= 13
    assert len(large["controls"]) >= 9
    if name == "unseen":
        assert len(large["seeds"]) >= 3
        assert set(ONLY_UNSEEN) <= set(asked["worlds"]["small"]["tasks"])
