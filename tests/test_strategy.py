"""ask / tell over adapters: a NumPy float64 reference, determinism, properties, convergence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loralab.adapters.state import AdapterState, Factors
from loralab.config import EvolutionConfig
from loralab.evolution.adapter_space import AdapterSpace, adapter_sigmas
from loralab.evolution.noise import fill, pair_and_sign
from loralab.evolution.start import start_adapter
from loralab.evolution.strategy import SearchState, ask, begin, tell

SHAPES = {"layers.0.q": (12, 10), "layers.0.up": (20, 10), "layers.1.q": (12, 10)}
WANTED = {"layers.0.q": 0.01, "layers.0.up": 0.5, "layers.1.q": 0.03}


def options(**changes: Any) -> EvolutionConfig:
    return EvolutionConfig.model_validate({"generations": 12, "population": 8} | changes)


def random_start(seed: int = 0, rank: int = 4) -> AdapterState:
    """A start whose B is not zero."""
    start = start_adapter(SHAPES, rank, 2.0, seed, "base")
    g = torch.Generator().manual_seed(seed)
    factors = {
        n: Factors(f.A, torch.randn(f.B.shape, generator=g)) for n, f in start.factors.items()
    }
    return replace(start, factors=factors)


def space(
    start: AdapterState, on_a: bool = False, dtype: torch.dtype = torch.float32
) -> AdapterSpace:
    return AdapterSpace(start, adapter_sigmas(start, WANTED, on_a, "rms", 0.1), dtype, on_a)


def search(seed: int = 5, on_a: bool = False, **changes: Any) -> SearchState:
    return begin(options(**changes), space(random_start(), on_a), seed)


def parts(state: SearchState) -> dict[str, np.ndarray]:
    return {
        name: part.astype(np.float64).copy()
        for name, part in state.space.layout.parts(state.master)
    }


def zscore(f: np.ndarray) -> np.ndarray:
    return (f - f.mean()) / f.std()


def reference(state: SearchState, fitness: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The masters after each generation, written out plainly in float64."""
    o, opt = state.options, state.options.optimizer
    master, start = parts(state), parts(state)
    m = {n: np.zeros_like(v) for n, v in master.items()}
    v = {n: np.zeros_like(x) for n, x in master.items()}
    out = []
    for g, rewards in enumerate(fitness):
        share = g / (o.generations - 1)
        half_cosine = 0.5 * (1 + np.cos(np.pi * share))
        ramp = {"constant": 1.0, "linear": 1 - share, "cosine": half_cosine}
        lr = opt.lr * (o.lr_schedule.final + (1 - o.lr_schedule.final) * ramp[o.lr_schedule.name])
        scale = o.sigma_schedule.final + (1 - o.sigma_schedule.final) * ramp[o.sigma_schedule.name]
        scale *= o.scale.init_scale if g == 0 else o.scale.perturb_scale
        for name in master:
            direction = np.zeros_like(master[name])
            for member, f in enumerate(zscore(rewards)):
                pair, sign = pair_and_sign(member, o.antithetic)
                eps = np.empty(direction.shape, dtype=np.float32)
                fill(eps, state.seed, g, pair, name)
                direction += f * sign * eps / o.population
            if opt.name == "momentum":
                m[name] = direction = opt.momentum * m[name] + direction
            elif opt.name == "adam":
                m[name] = opt.beta1 * m[name] + (1 - opt.beta1) * direction
                v[name] = opt.beta2 * v[name] + (1 - opt.beta2) * direction**2
                hat = v[name] / (1 - opt.beta2 ** (g + 1))
                direction = m[name] / (1 - opt.beta1 ** (g + 1)) / (np.sqrt(hat) + opt.eps)
            decay = lr * o.weight_decay * (master[name] - start[name])
            master[name] = master[name] + lr * scale * state.space.sigmas[name] * direction - decay
        out.append(dict(master))
    return out


CASES: list[dict[str, Any]] = [
    {},
    {"on_a": True},
    {"antithetic": False, "population": 7},
    {"optimizer": {"name": "momentum", "lr": 0.5, "momentum": 0.8}},
    {"optimizer": {"name": "adam", "lr": 0.1, "beta1": 0.8, "beta2": 0.95}},
    {"weight_decay": 0.3, "optimizer": {"lr": 0.6}},
    {"sigma_schedule": {"name": "cosine", "final": 0.2}, "lr_schedule": {"name": "linear"}},
    {"scale": {"init_scale": 3.0, "perturb_scale": 0.5}},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "plain")
def test_updates_are_the_reference_s(case: dict[str, Any]) -> None:
    state = search(**case)
    fitness = np.random.default_rng(1).normal(-100, 30, size=(6, state.options.population))
    for rewards, expected in zip(fitness, reference(state, fitness), strict=True):
        state = tell(state, ask(state), rewards)
        for name, part in parts(state).items():
            np.testing.assert_allclose(part, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("on_a", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_members_are_casts_of_master_plus_noise(on_a: bool, dtype: torch.dtype) -> None:
    start = random_start()
    state = begin(options(), space(start, on_a, dtype), seed=5)
    state = tell(state, None, np.random.default_rng(0).normal(size=8))  # generation 1
    members = ask(state).perturbed.members
    master = dict(state.space.layout.parts(state.master))
    for i, member in enumerate(members):
        for module, (a, b) in member.factors.items():
            for name, tensor in ((f"{module}.A", a), (f"{module}.B", b)):
                assert tensor.dtype == dtype
                if name not in master:
                    assert torch.equal(tensor, start.factors[module].A.to(dtype))
                    continue
                eps = np.empty(tensor.shape, dtype=np.float32)
                fill(eps, 5, 1, i // 2, name)
                sign = 1 if i % 2 == 0 else -1
                exact = master[name].reshape(eps.shape) + np.float32(sign) * (
                    eps * np.float32(state.space.sigmas[name])
                )
                assert torch.equal(tensor, torch.from_numpy(exact).to(dtype))


def test_members_share_what_they_do_not_differ_in() -> None:
    perturbed = ask(search()).perturbed
    again = perturbed.centre.adapter
    assert again is not None
    for name in SHAPES:
        assert len({id(m.factors[name].A) for m in (*perturbed.members, again)}) == 1
        assert len({id(m.factors[name].B) for m in perturbed.members}) == 8
    assert len({m.digest() for m in perturbed.members}) == 8


def test_a_member_changes_w_by_the_rms_wanted() -> None:
    start = start_adapter(SHAPES, 4, 2.0, 0, None)
    state = begin(options(population=512), space(start), seed=0)
    members = ask(state).perturbed.members
    for name, wanted in WANTED.items():
        changes = [m.scaling * m.factors[name].B @ m.factors[name].A for m in members]
        rms = float(torch.stack(changes).square().mean().sqrt())
        assert rms == pytest.approx(wanted, rel=0.03)


def test_the_start_is_the_base_model() -> None:
    start = start_adapter(SHAPES, 4, 2.0, 3, None)
    assert start.scaling == 0.5
    for name, (d_out, d_in) in SHAPES.items():
        a, b = start.factors[name]
        assert a.shape == (4, d_in)
        assert b.shape == (d_out, 4)
        assert not b.any()
    wide = start_adapter({"m": (4, 10_000)}, 8, 8.0, 3, None).factors["m"].A
    assert float(wide.std()) == pytest.approx(0.01, rel=0.02)
    assert start.digest() == start_adapter(SHAPES, 4, 2.0, 3, None).digest()
    assert start.digest() != start_adapter(SHAPES, 4, 2.0, 4, None).digest()
    q0, q1 = start.factors["layers.0.q"].A, start.factors["layers.1.q"].A
    assert not torch.equal(q0, q1)


def test_the_same_search_twice_is_the_same_to_the_bit() -> None:
    fitness = np.random.default_rng(2).normal(size=(5, 8))

    def run(threads: int, with_population: bool) -> list[str]:
        state, digests = search(optimizer={"name": "adam", "lr": 0.3}), []
        for rewards in fitness:
            population = ask(state, threads)
            digests += [m.digest() for m in population.perturbed.members]
            state = tell(state, population if with_population else None, rewards)
            digests.append(state.space.digest(state.master))
        return digests

    assert run(1, True) == run(3, True) == run(1, False)


def test_tell_leaves_the_old_state_alone() -> None:
    state = search(optimizer={"name": "momentum"}, weight_decay=0.1)
    state = tell(state, ask(state), np.arange(8.0))
    before, first = state.master.copy(), state.moments.first
    assert first is not None
    kept = first.copy()
    tell(state, ask(state), np.arange(8.0) ** 2)
    np.testing.assert_array_equal(state.master, before)
    np.testing.assert_array_equal(first, kept)


@settings(max_examples=25)
@given(
    value=st.floats(-1e6, 1e6),
    shaping=st.sampled_from(["raw", "zscore", "centered_rank"]),
    name=st.sampled_from(["sgd", "momentum", "adam"]),
)
def test_tied_rewards_change_nothing(value: float, shaping: str, name: str) -> None:
    state = search(shaping=shaping, optimizer={"name": name}, weight_decay=0.2)
    state = tell(state, None, np.arange(8.0))
    after = tell(state, ask(state), [value] * 8)
    assert after.generation == state.generation + 1
    np.testing.assert_array_equal(after.master, state.master)


def test_antithetic_pairs_cancel() -> None:
    """Pairs tied within themselves say nothing about any direction, however they differ."""
    for shaping in ("zscore", "centered_rank"):
        state = search(shaping=shaping)
        after = tell(state, ask(state), [1, 1, 5, 5, -3, -3, 2, 2])
        np.testing.assert_array_equal(after.master, state.master)
    members = ask(search()).perturbed.members
    master = search().space.centre(search().master).adapter
    assert master is not None
    for name in SHAPES:
        for i in range(0, 8, 2):
            middle = (members[i].factors[name].B + members[i + 1].factors[name].B) / 2
            torch.testing.assert_close(middle, master.factors[name].B)


def test_swapping_a_pair_s_rewards_turns_the_update_round() -> None:
    state = search()
    f = np.random.default_rng(3).normal(size=8)
    swapped = f.reshape(4, 2)[:, ::-1].reshape(-1)
    there = tell(state, None, f).master - state.master
    back = tell(state, None, swapped).master - state.master
    np.testing.assert_allclose(there, -back, atol=1e-7)


def test_what_the_cast_leaves_unchanged() -> None:
    """Nothing at B = 0, where every size of noise is seen; all of it on a master too large."""
    start = start_adapter(SHAPES, 4, 2.0, 0, None)
    fresh = ask(begin(options(), space(start, dtype=torch.bfloat16), 0)).perturbed
    assert fresh.unchanged_share is not None
    assert fresh.unchanged_share < 1e-3

    big = replace(
        start, factors={n: Factors(f.A, f.B + 10_000.0) for n, f in start.factors.items()}
    )
    drowned = ask(begin(options(), space(big, dtype=torch.bfloat16), 0)).perturbed
    assert drowned.unchanged_share is not None
    assert drowned.unchanged_share > 0.99
    exact = ask(begin(options(), space(big, dtype=torch.float32), 0)).perturbed
    assert exact.unchanged_share is not None
    assert exact.unchanged_share < 0.1


def quadratic(state: SearchState, target: np.ndarray) -> float:
    """Minus the squared distance to the target, in units of each tensor's sigma."""
    total = 0.0
    for (name, part), (_, goal) in zip(
        state.space.layout.parts(state.master), state.space.layout.parts(target), strict=True
    ):
        total -= float((((part - goal) / state.space.sigmas[name]) ** 2).sum())
    return total


def run_quadratic(shuffle: bool, **changes: Any) -> tuple[float, float]:
    generations = 150
    state = search(generations=generations, population=32, **changes)
    rng = np.random.default_rng(0)
    units = np.concatenate(
        [np.full(p.size, state.space.sigmas[n]) for n, p in state.space.layout.parts(state.master)]
    )
    target = (state.master + 3 * units * rng.normal(size=units.size)).astype(np.float32)
    first = quadratic(state, target)
    for _ in range(generations):
        population = ask(state)
        fitness = []
        for member in population.perturbed.members:
            flat = np.concatenate(
                [member.factors[n.rpartition(".")[0]].B.numpy().ravel() for n in _names(state)]
            )
            fitness.append(quadratic(replace(state, master=flat), target))
        if shuffle:
            rng.shuffle(fitness)
        state = tell(state, population, fitness)
    return first, quadratic(state, target)


def _names(state: SearchState) -> list[str]:
    return [name for name, _ in state.space.layout.parts(state.master)]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"lr": 1.0}},
        {"optimizer": {"lr": 3.0}, "shaping": "centered_rank"},
        {"optimizer": {"name": "momentum", "lr": 0.1}},
        {"optimizer": {"name": "adam", "lr": 0.1}},
        {"optimizer": {"lr": 1.0}, "antithetic": False},
    ],
    ids=["zscore", "ranks", "momentum", "adam", "independent"],
)
def test_it_climbs_a_quadratic(changes: dict[str, Any]) -> None:
    first, last = run_quadratic(shuffle=False, **changes)
    assert last > 0.3 * first


def test_shuffled_rewards_lead_nowhere() -> None:
    first, last = run_quadratic(shuffle=True, optimizer={"lr": 1.0})
    assert last < 0.95 * first


def test_misuse_is_refused() -> None:
    state = search()
    with pytest.raises(ValueError, match="expected 8 members first"):
        tell(state, None, np.zeros(7))
    with pytest.raises(ValueError, match="population of generation 0 told to a state of gen"):
        tell(tell(state, None, np.arange(8.0)), ask(state), np.arange(8.0))
