"""Members made by units, as actors make them, are the members made at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fake_engine import SHAPES
from loralab.adapters.state import Factors
from loralab.config import EvolutionConfig
from loralab.evolution.adapter_space import AdapterSpace
from loralab.evolution.space import Centre, Perturbed, Space
from loralab.evolution.start import start_adapter
from loralab.evolution.strategy import Population, SearchState, ask, begin, tell
from loralab.evolution.weight_space import WeightSpace

MODES: list[dict[str, Any]] = [
    {"noise_on": "B"},
    {"noise_on": "AB", "optimizer": {"name": "adam"}},
    {"noise_on": "B", "antithetic": False, "population": 5},
    {"noise_on": "weights", "noise_rank": 2},
    {"noise_on": "weights", "antithetic": False},
]


def search(dtype: torch.dtype, **changes: Any) -> SearchState:
    options = EvolutionConfig.model_validate({"generations": 9, "population": 8} | changes)
    space: Space
    if options.noise_on == "weights":
        sigmas = dict.fromkeys(SHAPES, 0.02)
        space = WeightSpace(SHAPES, sigmas, dtype, options.noise_rank)
    else:
        start, g = start_adapter(SHAPES, 4, 2.0, 0, "base"), torch.Generator().manual_seed(0)
        factors = {
            n: Factors(f.A, torch.randn(f.B.shape, generator=g)) for n, f in start.factors.items()
        }
        parts = "AB" if options.noise_on == "AB" else "B"
        sigmas = {f"{name}.{part}": 0.1 for name in SHAPES for part in parts}
        start = replace(start, factors=factors)
        space = AdapterSpace(start, sigmas, dtype, options.noise_on == "AB")
    return tell(begin(options, space, 3), None, np.arange(float(options.population)) ** 2)


def some(state: SearchState, only: list[int]) -> Perturbed:
    o = state.options
    return state.space.perturb(
        state.master, 3, 1, o.population, o.antithetic, state.sigma_scale, 1, only
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_some_pairs_are_those_of_the_whole(mode: dict[str, Any], dtype: torch.dtype) -> None:
    state = search(dtype, **mode)
    whole = ask(state).perturbed
    signs = 2 if state.options.antithetic else 1
    for only in ([0], [2], [1, 3], [0, 1, 2, 3]):
        part = some(state, only)
        members = [signs * pair + sign for pair in only for sign in range(signs)]
        assert [m.digest() for m in part.members] == [whole.members[i].digest() for i in members]
        assert part.noise is not None
        assert whole.noise is not None
        assert len(part.noise) == len(whole.noise)
        for pair, noise in enumerate(part.noise):
            assert noise.tolist() == (whole.noise[pair].tolist() if pair in only else [])
    if state.options.antithetic and state.options.noise_on != "AB":
        plus, minus = some(state, [1]).members
        name = next(iter(SHAPES))
        assert plus.factors[name].A is minus.factors[name].A


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_noise_kept_of_some_pairs_changes_nothing(mode: dict[str, Any]) -> None:
    state = search(torch.float32, **mode)
    fitness = np.random.default_rng(0).normal(size=state.options.population)
    drawn = tell(state, None, fitness)
    for only in ([1], [0, 3]):
        noise = some(state, only).noise
        partly = Population(1, Perturbed(Centre(None), (), noise, None))
        assert np.array_equal(tell(state, partly, fitness).master, drawn.master)
        # That noise is used: another in its place gives another point.
        assert noise is not None
        other = tuple(eps + 1 for eps in noise)
        wrong = Population(1, Perturbed(Centre(None), (), other, None))
        assert not np.array_equal(tell(state, wrong, fitness).master, drawn.master)
