"""Noise: standard normal, drawn again from its key, never shared."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.evolution.layout import Layout
from loralab.evolution.noise import draw, fill, key, pair_and_sign, pair_weights, pairs

SHAPES = {"layers.0.q.B": (64, 8), "layers.1.q.B": (64, 8), "layers.0.up.B": (200, 8)}


def normals(seed: int, generation: int, pair: int, name: str, size: int = 4096) -> np.ndarray:
    out = np.empty(size, dtype=np.float32)
    fill(out, seed, generation, pair, name)
    return out


def test_it_is_standard_normal() -> None:
    x = normals(3, 1, 4, "layers.2.q.B", 400_000).astype(np.float64)
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.var() - 1) < 5 * np.sqrt(2 / x.size)
    assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / x.size)
    assert np.abs(x).max() > 4


def test_a_known_value_stays_what_it_was() -> None:
    """Runs are replayed from their journals: the stream may never change."""
    assert key(0, 0, 0, "w") == 0xC2F755A0021C39E2B4F5848BC5EABE84
    np.testing.assert_array_equal(
        normals(0, 0, 0, "w", 4),
        np.array(
            [0.4681222140789032, 0.8858400583267212, -0.2626342177391052, 0.043309878557920456],
            dtype=np.float32,
        ),
    )


@pytest.mark.parametrize(
    "other", [(8, 3, 5, "a"), (7, 4, 5, "a"), (7, 3, 6, "a"), (7, 3, 5, "b"), (73, 5, 0, "a")]
)
def test_nothing_is_shared_between_keys(other: tuple[int, int, int, str]) -> None:
    ours, theirs = normals(7, 3, 5, "a"), normals(*other)
    assert not np.intersect1d(ours, theirs).size > 4096 * 0.01  # float32 values do collide
    assert abs(np.corrcoef(ours, theirs)[0, 1]) < 5 / np.sqrt(4096)
    for lag in range(1, 64):
        assert not np.array_equal(ours[lag : lag + 256], theirs[:256])
        assert not np.array_equal(theirs[lag : lag + 256], ours[:256])


@given(
    st.lists(
        st.tuples(st.integers(0, 2**63), st.integers(-1, 10**6), st.integers(0, 10**4), st.text()),
        min_size=2,
        max_size=20,
        unique=True,
    )
)
def test_keys_differ(parts: list[tuple[int, int, int, str]]) -> None:
    def encodable(name: str) -> str:
        return name.encode("utf-8", "replace").decode()

    distinct = {(s, g, p, encodable(n)) for s, g, p, n in parts}
    assert len({key(*part) for part in distinct}) == len(distinct)


def test_a_tensor_s_noise_does_not_depend_on_its_neighbours() -> None:
    whole = Layout(SHAPES)
    noise = dict(whole.parts(draw(whole, 1, 2, 3)))
    for name, shape in SHAPES.items():
        alone = draw(Layout({name: shape}), 1, 2, 3)
        np.testing.assert_array_equal(noise[name], alone)
    assert not np.array_equal(noise["layers.0.q.B"], noise["layers.1.q.B"])


def test_members_pair_up_by_parity() -> None:
    assert [pair_and_sign(m, True) for m in range(4)] == [(0, 1), (0, -1), (1, 1), (1, -1)]
    assert [pair_and_sign(m, False) for m in range(3)] == [(0, 1), (1, 1), (2, 1)]
    assert pairs(30, True) == 15
    assert pairs(30, False) == 30


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20).filter(lambda f: len(f) % 2 == 0),
    st.booleans(),
)
def test_pair_weights_are_the_sum_over_members(fitness: list[float], antithetic: bool) -> None:
    weights = [0.0] * pairs(len(fitness), antithetic)
    for member, f in enumerate(fitness):
        pair, sign = pair_and_sign(member, antithetic)
        weights[pair] += sign * f
    assert pair_weights(fitness, antithetic) == weights
