"""What every start states and promises at step 0; those that look at shapes alone, in full."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from loralab.adapters.inits.base import Facts
from loralab.errors import UserError
from loralab.registry import INITS
from starts import (
    RANK,
    SPLITTING,
    factors,
    ids,
    layers,
    logits,
    peft_model,
    start,
)

BLIND = ("zero_b", "tiny", "random", "orthogonal", "orthogonal_negative", "gaussian", "mica")


@pytest.mark.parametrize("name", sorted(INITS.names()))
def test_every_row_states_its_facts(name: str) -> None:
    facts = INITS.load(name).facts
    assert isinstance(facts, Facts)
    assert all((facts.formula, facts.source, facts.unchanged, facts.cost, facts.needs))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "name", ["zero_b", "orthogonal", "gaussian", "mica", "eva", "progressive", *SPLITTING]
)
def test_the_function_is_unchanged_at_step_0(name: str, kind: str) -> None:
    reference = logits(tiny.model(kind))
    model = peft_model(kind)
    if (name, kind) == ("olora", "gpt2"):
        with pytest.raises(UserError, match="Conv1D"):
            start(model, name)
        return
    start(model, name)
    exact = INITS.load(name).facts.unchanged.startswith("exactly")
    torch.testing.assert_close(
        logits(model), reference, atol=0 if exact else 2e-4, rtol=0 if exact else 1e-4
    )


@pytest.mark.parametrize("name", ["random", "orthogonal_negative"])
def test_what_is_broken_on_purpose_changes_the_function(name: str) -> None:
    model = peft_model()
    report = start(model, name)
    assert (logits(model) - logits(tiny.model("llama"))).abs().max() > 0.5
    assert min(report.relative_size.values()) > 0.03


@pytest.mark.parametrize("name", [*BLIND, "output_match", "eva", *SPLITTING])
def test_a_seed_gives_one_start_and_another_gives_another(name: str) -> None:
    def started(seed: int) -> Any:
        model = peft_model()
        torch.manual_seed(seed * 17 + 3)  # the global generator must not matter
        start(model, name, seed=seed)
        return factors(model)

    one, again, other = started(1), started(1), started(2)
    assert all(torch.equal(x, y) for n in one for x, y in zip(one[n], again[n], strict=True))
    if name not in ("mica", "pissa", "olora", "corda", "eva", "lora_ga"):  # these draw nothing
        assert any(not torch.equal(one[n].A, other[n].A) for n in one)


def test_equal_shapes_do_not_share_their_start() -> None:
    model = peft_model()
    start(model, "zero_b")
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for pair in factors(model).values():
        by_shape.setdefault(tuple(pair.A.shape), []).append(pair.A)
    assert any(len(same) > 1 for same in by_shape.values())
    for same in by_shape.values():
        assert len({tuple(a.flatten().tolist()) for a in same}) == len(same)


def test_zero_b_gaussian_has_three_times_the_variance_of_kaiming() -> None:
    sizes = {}
    for a in ("kaiming", "gaussian"):
        model = peft_model(rank=32)
        start(model, "zero_b", a=a)
        sizes[a] = sum(float(p.A.pow(2).sum()) for p in factors(model).values())
    assert sizes["gaussian"] / sizes["kaiming"] == pytest.approx(3, rel=0.05)


def test_gaussian_is_of_the_size_peft_says() -> None:
    model = peft_model(rank=32)
    start(model, "gaussian")
    a = torch.cat([pair.A.flatten() for pair in factors(model).values()])
    assert float(a.std()) == pytest.approx(1 / 32, rel=0.02)
    assert not any(pair.B.any() for pair in factors(model).values())


def test_tiny_is_random_scaled_once_for_each_factor() -> None:
    full, small = peft_model(), peft_model()
    start(full, "random")
    start(small, "tiny", scale=0.1)
    for name, pair in factors(full).items():
        torch.testing.assert_close(factors(small)[name].A, 0.1 * pair.A)
        torch.testing.assert_close(factors(small)[name].B, 0.1 * pair.B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_pairs_cancel_exactly_in_any_order(dtype: torch.dtype) -> None:
    model = peft_model(rank=32)
    start(model, "orthogonal")
    for a, b in factors(model).values():
        held_a, held_b = a.to(dtype).float(), b.to(dtype).float()
        assert torch.equal(held_a, a)
        assert torch.equal(held_b, b)
        assert a.abs().sum() > 0
        assert b.abs().sum() > 0
        for seed in range(3):
            order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
            total = torch.zeros(b.shape[0], a.shape[1])
            for k in order:  # one rank at a time: the least forgiving order of summation
                total += torch.outer(held_b[:, k], held_a[k])
            assert not total.any()
        gram = a[:16] @ a[:16].T
        torch.testing.assert_close(gram, torch.eye(16), atol=0.05, rtol=0)


def test_orthogonal_learns_through_both_factors_at_once() -> None:
    def gradients(name: str) -> tuple[float, float]:
        model = peft_model()
        start(model, name)
        model(input_ids=ids(), labels=ids()).loss.backward()
        found = [
            (m.lora_A["default"].weight.grad, m.lora_B["default"].weight.grad)
            for m in layers(model).values()
        ]
        return (
            sum(float(a.norm()) for a, _ in found),
            sum(float(b.norm()) for _, b in found),
        )

    assert gradients("zero_b")[0] == 0
    assert min(gradients("orthogonal")) > 0.01


def test_orthogonal_s_columns_are_as_long_as_asked_for() -> None:
    model = peft_model(rank=8)
    start(model, "orthogonal", b_scale=0.25)
    for pair in factors(model).values():
        torch.testing.assert_close(pair.A.norm(dim=1), torch.ones(8), atol=0.02, rtol=0)
        torch.testing.assert_close(pair.B.norm(dim=0), torch.full((8,), 0.25), atol=0.005, rtol=0)


def test_orthogonal_needs_an_even_rank() -> None:
    with pytest.raises(UserError, match="even rank"):
        start(peft_model(rank=3), "orthogonal")


def test_orthogonal_negative_is_minus_a_projector() -> None:
    model = peft_model()
    start(model, "orthogonal_negative")
    for layer in layers(model).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if a.shape[1] == b.shape[0]:
            change = (layer.scaling["default"] * b @ a).detach()
            torch.testing.assert_close(change @ change, -change, atol=1e-5, rtol=0)
            assert torch.linalg.matrix_norm(change) == pytest.approx(sqrt(RANK), rel=1e-4)
