"""What generations show: noise that tells nothing, and reward without merit."""

from __future__ import annotations

import math

import pytest

from loralab.health.population import (
    WINDOW,
    dominance,
    generation_shares,
    loops,
    population_values,
)
from loralab.health.reading import Reading
from loralab.health.rules import judge


def fails(reading: Reading) -> list[str]:
    return [one.rule for one in judge([reading]) if one.severity == "fail"]


def rows(count: int, **columns: list[float] | float) -> list[dict[str, float]]:
    return [
        {key: v[at] if isinstance(v, list) else v for key, v in columns.items()}
        for at in range(count)
    ]


def test_shares_of_a_generation() -> None:
    rewards = [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    texts = [["a", "x"], ["a", "x"], ["b", "x"], ["a", "y"]]
    shares = generation_shares(rewards, texts, antithetic=True)
    assert shares == {"informative_share": 0.5, "distinct_share": 0.25, "looping_share": 0.0}
    alone = generation_shares(rewards, texts, antithetic=False)
    assert alone["informative_share"] == 0.5
    assert loops("the cat " * 20)
    assert loops("\n" * 80)
    assert not loops("- one\n- two\n- three\n- four")
    assert not loops("")


def test_dominance_is_relative_to_the_median_module() -> None:
    assert dominance({"a": 0.1, "b": 0.1, "c": 0.1, "d": 0.9}) == pytest.approx(9)
    assert math.isnan(dominance({"a": 0.1, "b": 9.0}))


def test_a_search_whose_reward_rises_while_answers_get_worse_fails() -> None:
    n = 3 * WINDOW
    wobble = [0.01 * (at % 3) for at in range(n)]
    up = [0.1 + 0.05 * at + wobble[at] for at in range(n)]
    down = [0.6 - 0.03 * at + wobble[at] for at in range(n)]
    bad = population_values(rows(n, reward_mean=up, reward_std=0.1, correct=down))
    good = population_values(rows(n, reward_mean=up, reward_std=0.1, correct=up))
    assert bad["es.second_measure"] > 3 < bad["es.reward_up"]
    assert good["es.second_measure"] < 0
    step = {"train.step": float(n)}
    assert fails(Reading(n, bad | step, (), 0.0)) == ["es.second_measure"]
    assert fails(Reading(n, good | step, (), 0.0)) == []


def test_a_search_without_a_signal_fails_and_a_solved_one_does_not() -> None:
    columns = {"reward_mean": 0.2, "reward_std": 0.0, "tied_share": 1.0, "informative_share": 0.0}
    silent = population_values(rows(6, **columns, distinct_share=0.0, correct=0.1))
    solved = population_values(rows(6, **columns, distinct_share=0.0, correct=1.0))
    assert fails(Reading(5, silent | {"train.step": 6.0}, (), 0.0)) == ["es.silent"]
    assert fails(Reading(5, solved | {"train.step": 6.0}, (), 0.0)) == []
    unjudged = population_values(rows(6, **columns, distinct_share=0.0))
    assert fails(Reading(5, unjudged | {"train.step": 6.0}, (), 0.0)) == ["es.silent"]


def test_training_reward_up_and_held_out_reward_down_is_a_gap() -> None:
    n = 3 * WINDOW
    up = [0.1 + 0.05 * at for at in range(n)]
    hill = [0.5 - 0.02 * abs(at - 4) for at in range(n)]
    apart = population_values(rows(n, reward_mean=up, reward_std=0.1, held_out_reward=hill))
    along = population_values(rows(n, reward_mean=up, reward_std=0.1, held_out_reward=up))
    assert apart["es.held_out_gap"] > 3
    assert along["es.held_out_gap"] < 1


def test_a_gap_needs_held_out_scores() -> None:
    """Of a policy that learns there are none."""
    values = population_values(rows(20, reward_mean=[0.1 * at for at in range(20)]))
    assert values["es.reward_up"] > 3
    assert math.isnan(values["es.held_out_gap"])


def test_a_fall_within_the_noise_is_none() -> None:
    n = 3 * WINDOW
    up = [0.1 + 0.05 * at for at in range(n)]
    dip = [0.5 if at < 2 * WINDOW else 0.48 for at in range(n)]
    values = population_values(rows(n, reward_mean=up, reward_std=0.1, correct=dip))
    assert values["es.second_measure"] > 3 < values["es.reward_up"]
    assert values["es.second_fall"] == pytest.approx(0.02)
    assert fails(Reading(n, values | {"train.step": float(n)}, (), 0.0)) == []


def test_a_young_search_is_not_judged_by_its_history() -> None:
    values = population_values(rows(3, reward_mean=[0.0, 1.0, 5.0], reward_std=0.1))
    assert math.isnan(values["es.reward_up"])
    assert population_values([{"generation": 3, "held_out_reward": 1.0}]) == {}
