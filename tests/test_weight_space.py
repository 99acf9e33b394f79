"""Search over the weights themselves: members, updates, and what becomes of the sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loralab.adapters.truncate import truncate
from loralab.config import EvolutionConfig
from loralab.evolution.noise import fill
from loralab.evolution.strategy import SearchState, ask, begin, tell
from loralab.evolution.weight_space import WeightSpace

SHAPES = {"layers.0.q": (12, 10), "layers.0.up": (20, 10), "layers.1.q": (12, 10)}
SIGMAS = {"layers.0.q": 0.01, "layers.0.up": 0.5, "layers.1.q": 0.03}


def search(rank: int, dtype: torch.dtype = torch.float32, **changes: Any) -> SearchState:
    options = EvolutionConfig.model_validate(
        {"generations": 10, "population": 6, "noise_on": "weights", "noise_rank": rank} | changes
    )
    return begin(options, WeightSpace(SHAPES, SIGMAS, dtype, rank), seed=4)


def change_of_pair(state: SearchState, pair: int, name: str) -> np.ndarray:
    """E F^T / sqrt(k) in float64."""
    d_out, d_in = SHAPES[name]
    rank = state.options.noise_rank
    e, f = np.empty((d_out, rank), np.float32), np.empty((rank, d_in), np.float32)
    fill(e, state.seed, state.generation, pair, f"{name}.E")
    fill(f, state.seed, state.generation, pair, f"{name}.F")
    return e.astype(np.float64) @ f.astype(np.float64) / np.sqrt(rank)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_member_is_low_rank_noise_on_the_weights(rank: int, dtype: torch.dtype) -> None:
    state = tell(search(rank, dtype), None, np.arange(6.0))
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    perturbed = ask(state).perturbed
    for i, member in enumerate(perturbed.members):
        assert member.rank == rank
        for name, (a, b) in member.factors.items():
            assert a.dtype == b.dtype == dtype
            expected = (1 - 2 * (i % 2)) * SIGMAS[name] * change_of_pair(state, i // 2, name)
            actual = member.scaling * b.double() @ a.double()
            np.testing.assert_allclose(
                actual.numpy(), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
            )
    plus, minus = perturbed.members[:2]
    assert plus.factors["layers.0.q"].A is minus.factors["layers.0.q"].A


@pytest.mark.parametrize("rank", [1, 4])
def test_the_size_of_a_change_does_not_depend_on_the_noise_s_rank(rank: int) -> None:
    members = ask(search(rank, population=400)).perturbed.members
    for name, sigma in SIGMAS.items():
        changes = torch.stack([m.factors[name].B @ m.factors[name].A for m in members])
        assert float(changes.square().mean().sqrt()) == pytest.approx(sigma, rel=0.05)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("antithetic", [True, False])
def test_the_update_is_the_sum_of_the_members_changes(rank: int, antithetic: bool) -> None:
    state = search(rank, antithetic=antithetic, optimizer={"lr": 0.7})
    expected = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for rewards in np.random.default_rng(0).normal(size=(4, 6)):
        z = (rewards - rewards.mean()) / rewards.std()
        for name in SHAPES:
            for i, f in enumerate(z):
                pair, sign = (i // 2, 1 - 2 * (i % 2)) if antithetic else (i, 1)
                noise = change_of_pair(state, pair, name)
                expected[name] += 0.7 * SIGMAS[name] * f * sign * noise / 6
        state = tell(state, ask(state), rewards)
    change = state.space.centre(state.master).change
    assert change is not None
    for name, dense in change.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(dense.numpy(), expected[name], rtol=1e-5, atol=1e-6 * scale)


def test_it_is_the_same_on_any_number_of_threads_and_without_its_population() -> None:
    def run(threads: int, keep: bool) -> str:
        state = search(2, optimizer={"name": "adam", "lr": 0.1})
        for rewards in np.random.default_rng(0).normal(size=(4, 6)):
            population = ask(state, threads)
            state = tell(state, population if keep else None, rewards)
        return state.space.digest(state.master)

    assert run(1, True) == run(2, True) == run(1, False)


def test_how_much_the_weights_dtype_absorbs() -> None:
    weights = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}

    def share(sigma: float) -> float:
        space = WeightSpace(SHAPES, dict.fromkeys(SHAPES, sigma), torch.bfloat16, weights=weights)
        options = search(1).options
        measured = ask(begin(options, space, 0)).perturbed.unchanged_share
        assert measured is not None
        return measured

    assert share(1e-6) > 0.99
    assert share(1.0) < 0.05
    assert ask(search(1)).perturbed.unchanged_share is None


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (5, 40), (40, 5)])
def test_truncation_is_the_svd_s(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(delta.double())
    cut = truncate({"m": delta}, rank=4, scaling=2.0)
    best = u[:, :4] @ torch.diag(s[:4]) @ vt[:4]
    a, b = cut.adapter.factors["m"]
    torch.testing.assert_close(2.0 * b.double() @ a.double(), best, atol=1e-4, rtol=1e-4)
    expected = float(s[4:].norm() / s.norm())
    assert cut.modules["m"] == pytest.approx(expected, rel=1e-5)
    assert cut.total == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-4, atol=1e-4)
    assert a.shape == (4, shape[1])
    assert b.shape == (shape[0], 4)


@pytest.mark.parametrize("spectrum", ["flat", "falling"])
@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_truncation_of_a_large_matrix_loses_next_to_no_more_than_it_must(
    shape: tuple[int, int], spectrum: str
) -> None:
    g = torch.Generator().manual_seed(3)
    delta = torch.randn(shape, generator=g)
    if spectrum == "flat":  # as evolution leaves it: a sum of many rank-1 changes
        delta = torch.randn(shape[0], 90, generator=g) @ torch.randn(90, shape[1], generator=g)
    else:
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        delta = u @ torch.diag(s * torch.arange(1, len(s) + 1) ** -1.0) @ vt
    s = torch.linalg.svdvals(delta.double())
    least = float(s[8:].norm() / s.norm())
    cut = truncate({"m": delta}, 8, 1.0)
    assert least * (1 - 1e-5) <= cut.modules["m"] <= least * 1.005
    again = truncate({"m": delta}, 8, 1.0)
    assert again.adapter.digest() == cut.adapter.digest()


def test_truncation_of_low_rank_and_of_nothing_is_exact() -> None:
    g = torch.Generator().manual_seed(1)
    low = torch.randn(30, 3, generator=g) @ torch.randn(3, 40, generator=g)
    cut = truncate({"low": low, "none": torch.zeros(6, 4), "narrow": low[:2]}, 8, 1.0)
    assert cut.modules["low"] < 1e-6
    assert cut.modules["none"] == 0
    assert cut.modules["narrow"] < 1e-6
    assert cut.adapter.factors["narrow"].A.shape == (8, 40)
    assert all(bool(torch.isfinite(t).all()) for f in cut.adapter.factors.values() for t in f)
    with pytest.raises(ValueError, match="low: the change holds NaN"):
        truncate({"low": low * float("nan")}, 8, 1.0)


def test_the_total_error_weighs_modules_by_their_size() -> None:
    g = torch.Generator().manual_seed(2)
    small, large = torch.randn(20, 20, generator=g), torch.randn(20, 20, generator=g) * 100
    cut = truncate({"small": small, "large": large}, 2, 1.0)
    assert cut.total == pytest.approx(cut.modules["large"], rel=1e-3)
