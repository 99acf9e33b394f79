"""Fitness shaping: references in float64, ties, permutations, monotone maps, junk."""

from __future__ import annotations

from math import inf, isfinite, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.evolution.shaping import shape, tied_share

SHAPINGS = ("raw", "zscore", "centered_rank")
finite = st.floats(-1e300, 1e300)
rewards = st.lists(finite, min_size=2, max_size=12)


def table(draw_rows: int = 6) -> st.SearchStrategy[list[list[float]]]:
    row = st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3)
    return st.lists(row, min_size=2, max_size=draw_rows)


def test_zscore_is_numpy_s() -> None:
    f = np.random.default_rng(0).normal(-180, 20, size=(30, 4))
    mean = f.mean(1)
    np.testing.assert_allclose(shape(f, "zscore"), (mean - mean.mean()) / mean.std(), rtol=1e-12)


def test_ranks_are_averaged_over_ties() -> None:
    assert shape([3.0, 1.0, 3.0, 2.0, 9.0], "centered_rank") == [
        (2.5 - 2) / 4,
        -0.5,
        (2.5 - 2) / 4,
        -0.25,
        0.5,
    ]


def test_raw_is_the_mean_reward() -> None:
    assert shape([[1.0, 3.0], [5.0, -1.0]], "raw") == [2.0, 2.0]


@pytest.mark.parametrize("shaping", ["zscore", "centered_rank"])
def test_the_baseline_compares_prompt_by_prompt(shaping: str) -> None:
    """A prompt with a thousand times the spread counts no more than another."""
    rng = np.random.default_rng(1)
    quiet, loud = rng.normal(size=8), rng.normal(size=8) * 1000 + 5000
    both = np.stack([quiet, loud], 1)
    expected = (np.array(shape(quiet, shaping)) + np.array(shape(loud, shaping))) / 2
    np.testing.assert_allclose(shape(both, shaping, per_prompt=True), expected, atol=1e-15)
    assert not np.allclose(shape(both, shaping), expected, atol=0.01)


def test_the_raw_baseline_is_the_prompt_s_mean() -> None:
    f = np.random.default_rng(2).normal(size=(6, 3))
    np.testing.assert_allclose(
        shape(f, "raw", per_prompt=True), (f - f.mean(0)).mean(1), atol=1e-15
    )


@given(finite, st.integers(2, 9), st.sampled_from(SHAPINGS), st.booleans())
def test_ties_weigh_exactly_nothing(f: float, n: int, shaping: str, per_prompt: bool) -> None:
    if shaping == "raw":
        per_prompt = True  # raw alone does not centre
    assert shape([[f, -f, f / 3]] * n, shaping, per_prompt=per_prompt) == [0.0] * n


@given(rewards, st.sampled_from(SHAPINGS))
def test_equal_rewards_get_equal_weights_and_better_ones_no_less(
    f: list[float], shaping: str
) -> None:
    shaped = shape(f, shaping)
    assert all(isfinite(s) for s in shaped)
    for a, x in zip(f, shaped, strict=True):
        for b, y in zip(f, shaped, strict=True):
            assert (a != b) or (x == y)
            assert (a <= b) <= (x <= y)
    if shaping != "raw":
        assert abs(sum(shaped)) < 1e-9 * len(f)


@given(table(), st.permutations(range(3)), st.sampled_from(SHAPINGS), st.booleans())
def test_the_order_of_prompts_does_not_matter(
    f: list[list[float]], order: list[int], shaping: str, per_prompt: bool
) -> None:
    shuffled = [[row[i] for i in order] for row in f]
    assert shape(shuffled, shaping, per_prompt=per_prompt) == shape(
        f, shaping, per_prompt=per_prompt
    )


@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=12),
    st.floats(1e-3, 1e3),
    st.floats(-1e3, 1e3),
)
def test_ranks_see_only_the_order(f: list[int], slope: float, shift: float) -> None:
    mapped = [slope * float(x) ** 3 + shift + x for x in f]
    distinct = len(set(mapped)) == len(set(f))
    assert not distinct or shape(mapped, "centered_rank") == shape(f, "centered_rank")


@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize("junk", [nan, inf, -inf])
def test_junk_counts_as_the_floor(shaping: str, junk: float) -> None:
    assert shape([1.0, junk, 3.0], shaping, floor=-5.0) == shape([1.0, -5.0, 3.0], shaping)
    assert shape([1.0, junk, 3.0], shaping) == shape([1.0, 1.0, 3.0], shaping)
    assert shape([junk, junk], shaping) == [0.0, 0.0]


def test_tied_share() -> None:
    assert tied_share([1.0, 2.0, 3.0, 4.0]) == 0
    assert tied_share([1.0, 1.0, 3.0, 4.0]) == 0.5
    assert tied_share([2.0, 2.0, 2.0]) == 1


@pytest.mark.parametrize("bad", [[1.0], [[]], [[], []], 3.0, np.zeros((2, 2, 2))])
def test_a_wrong_shape_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="fitness has shape"):
        shape(bad, "zscore")
