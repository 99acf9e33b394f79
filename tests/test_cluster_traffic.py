"""What a generation sends, measured: kilobytes, whatever the model's size.

`python tests/test_cluster_traffic.py` prints the table of docs/cluster.md.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from loralab.evolution.cluster.messages import (
    compact,
    floats,
    in_full,
    outlined,
    pack,
    restored,
    stand_ins,
    unpack,
)
from loralab.health.population import generation_shares, loops
from loralab.rollouts import Rollout
from loralab.tasks.base import Example, Score

MEGABYTE = 1_000_000


def rollouts(count: int, seed: int, rewards: str) -> list[Rollout]:
    """Completions of 200 tokens or so; rewards of few values, or any float at all."""
    rng, made = random.Random(seed), list[Rollout]()
    for place in range(count):
        words = [rng.choice("abcdefgh") * rng.randint(1, 9) for _ in range(rng.randint(3, 30))]
        text = " ".join(words) if rng.random() > 0.2 else "same"
        text = "over and " * 60 if rng.random() < 0.1 else text
        reward = rng.gauss(0, 1) if rewards == "any" else rng.choice((0.0, 0.1, 1.0))
        failed = "logits are NaN" if rng.random() < 0.01 else None
        score = Score(reward, rng.choice((True, False)), {"term": reward})
        made.append(Rollout(Example(str(place), {}), "ask", text, len(words), score, failed))
    return made


def generation(members: int, prompts: int, actors: int, rewards: str) -> tuple[int, int]:
    """Bytes sent and received, with units of one pair and a text for each new best."""
    rng = random.Random(0)
    unit = {"kind": "unit", "generation": 999, "pairs": [members], "indices": list(range(prompts))}
    sent = received = 0
    best = float("-inf")
    for pair in range(members // 2):
        made = rollouts(2 * prompts, pair, rewards)
        top = max(made, key=lambda one: one.score.reward)
        shown = [pair, in_full(top)] if top.score.reward > best or pair < actors else None
        best = max(best, top.score.reward)
        answer = {"digest": "0" * 32, "outline": outlined(made), "top": shown}
        sent += len(pack({**unit, "beat": [best, pair]}))
        received += len(pack({**answer, "tokens": 12345, "unchanged_share": rng.random()}))
    weights = compact([rng.gauss(0, 1) for _ in range(members // 2)])
    entry = {"generation": 999, "weights": weights}
    sent += actors * len(pack({"kind": "advance", "entries": [{**entry, "held_out": 0.5}]}))
    return sent, received


@pytest.mark.parametrize(("members", "prompts"), [(30, 128), (128, 64)])
def test_a_generation_is_under_a_megabyte(members: int, prompts: int) -> None:
    sent, received = generation(members, prompts, 8, "any")
    assert 10_000 < sent + received < 0.3 * MEGABYTE
    few = sum(generation(members, prompts, 8, "few"))
    assert few < sent + received


@pytest.mark.parametrize("rewards", ["few", "any"])
def test_the_largest_generation_of_the_plan_is_under_a_megabyte(rewards: str) -> None:
    assert sum(generation(512, 128, 8, rewards)) < MEGABYTE


def test_floats_travel_to_the_last_bit() -> None:
    rng = random.Random(3)
    many = [rng.gauss(0, 1) for _ in range(200)]
    few, odd = [0.1, 1.0] * 9, [*many, 0.0, -0.0, 5e-324, 1.7e308, float("inf")]
    for values in (many, odd, few, [1, 2.5], []):
        again = floats(unpack(pack({"v": compact(values)}))["v"])
        assert repr(again) == repr(values)
    sent = len(pack({"v": compact(many)}))
    assert sent < 0.85 * len(pack({"v": many}))
    assert compact(few) == few


def test_stand_ins_say_what_the_texts_said() -> None:
    made = rollouts(60, 5, "any")
    examples, prompts = [one.example for one in made], ["ask"] * 60
    outline = unpack(pack(outlined(made)))
    again = stand_ins(outline, examples, prompts)
    assert [one.score.reward for one in again] == [one.score.reward for one in made]
    assert [one.score.correct for one in again] == [one.score.correct for one in made]
    assert [one.failed is None for one in again] == [one.failed is None for one in made]
    assert [loops(one.text) for one in again] == [loops(one.text) for one in made]
    assert 0 < sum(loops(one.text) for one in again) < 60
    for one in range(60):
        for other in range(one):
            same = made[one].text == made[other].text
            assert (again[one].text == again[other].text) == same

    def shares(given: Sequence[Rollout]) -> dict[str, float]:
        table = [[r.score.reward for r in given[at : at + 10]] for at in range(0, 60, 10)]
        texts = [[r.text for r in given[at : at + 10]] for at in range(0, 60, 10)]
        return generation_shares(table, texts, antithetic=True)

    assert shares(again) == shares(made)


def test_a_rollout_that_is_shown_arrives_whole() -> None:
    for one in rollouts(20, 2, "any"):
        assert restored(unpack(pack(in_full(one))), one.example, one.prompt) == one


if __name__ == "__main__":
    print("| members | prompts | rewards | sent | received |")
    print("| ---: | ---: | --- | ---: | ---: |")
    for size in ((8, 2), (30, 128), (128, 64), (512, 128)):
        for kind in ("few", "any"):
            out, back = generation(*size, 8, kind)
            print(
                f"| {size[0]} | {size[1]} | {kind} | {out / 1000:.1f} kB | {back / 1000:.1f} kB |"
            )
