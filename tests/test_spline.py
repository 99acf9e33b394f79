"""LS-LoRA: the function, its start, its options."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tiny
from loralab.adapters import LSLoraConfig
from loralab.adapters.spline import (
    BEND,
    LoraSpline,
    knot_positions,
    soft_spline,
    spline,
)
from loralab.adapters.spline_diagnostics import (
    splines,
)
from loralab.errors import UserError
from spline_models import (
    IDS,
    adapted,
    config,
    normal,
)


def reference(z: np.ndarray, v: np.ndarray, low: float, high: float, boundary: str) -> np.ndarray:
    k = np.linspace(low, high, len(v))
    y = np.interp(z, k, v)
    if boundary == "extrapolate":
        step = k[1] - k[0]
        y = np.where(z < low, v[0] + (z - low) * (v[1] - v[0]) / step, y)
        y = np.where(z > high, v[-1] + (z - high) * (v[-1] - v[-2]) / step, y)
    return y


@pytest.mark.parametrize("boundary", ["extrapolate", "clamp"])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_function_matches_numpy(count: int, boundary: Any) -> None:
    low, high = -1.7, 2.9
    values = normal(count, seed=count, scale=2)
    z = torch.cat([normal(300, seed=9, scale=3), knot_positions(count, low, high)])
    want = reference(z.double().numpy(), values.double().numpy(), low, high, boundary)
    got = spline(z, values, low, high, boundary)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)


@pytest.mark.parametrize("boundary", ["extrapolate", "clamp"])
def test_function_has_the_right_gradients(boundary: Any) -> None:
    z = normal(40, seed=1, scale=3).double().requires_grad_()
    values = normal(5, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, v: spline(z, v, -3.0, 3.0, boundary), (z, values))


def test_function_keeps_nan() -> None:
    assert spline(torch.tensor([math.nan]), normal(5), -3.0, 3.0).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "low", "high"), [(5, -3.0, 3.0), (7, -1.1, 2.3)])
def test_identity_is_exact_everywhere(
    count: int, low: float, high: float, held: torch.dtype, dtype: torch.dtype
) -> None:
    z = torch.cat([normal(500, scale=10.0**power, seed=2) for power in (-6, -3, 0, 1, 3)])
    z = z.to(dtype)
    values = knot_positions(count, low, high).to(held)
    assert torch.equal(spline(z, values, low, high), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_starts_as_plain_lora_bit_for_bit(gated: bool, dtype: torch.dtype) -> None:
    base = tiny.model("llama", dtype)
    ours = adapted(copy.deepcopy(base), gated=gated)
    torch.manual_seed(0)
    plain = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    )
    plain.load_state_dict(ours.state_dict(), strict=False)
    want = plain(input_ids=IDS).logits
    with plain.disable_adapter():
        assert (want - plain(input_ids=IDS).logits).abs().max() > 0.5
    assert torch.equal(ours(input_ids=IDS).logits, want)


def test_clamp_loses_the_gradient_outside_the_grid_and_extrapolation_keeps_it() -> None:
    for boundary, slope in (("clamp", 0.0), ("extrapolate", 2.5)):
        z = torch.tensor([-9.0, 7.0], requires_grad=True)
        values = torch.tensor([-2.5, 0.0, 2.5])
        spline(z, values, -1.0, 1.0, boundary).sum().backward()  # type: ignore[arg-type]
        assert z.grad is not None
        assert z.grad.tolist() == [slope, slope]


def test_knot_gradients_from_bf16_inputs_are_those_of_fp32() -> None:
    z, upstream = normal(4096, 8, seed=3, scale=2).bfloat16(), normal(4096, 8, seed=4).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        values = (knot_positions(5, -3.0, 3.0) + normal(5, seed=5)).to(torch.float64)
        values = values.float() if dtype is torch.bfloat16 else values
        values.requires_grad_()
        spline(z.to(dtype), values, -3.0, 3.0).backward(upstream.to(dtype))
        assert values.grad is not None
        found.append(values.grad.double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("knots", [2, 5, 6, 7, 9])
def test_soft_interpolation_and_its_gradients_are_autograd_s(knots: int) -> None:
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(40, 2000, generator=generator, dtype=torch.float64)
    z[0, :4] = torch.tensor([-400.0, 400.0, -3.0, 3.0])
    values = torch.randn(knots, generator=generator, dtype=torch.float64)
    weight = torch.randn(z.shape, generator=generator, dtype=torch.float64)

    def reference(z: Tensor, values: Tensor) -> Tensor:
        grid = torch.linspace(-3, 3, knots, dtype=torch.float64)
        distance = (z.unsqueeze(-1) - grid) * ((knots - 1) / 6)
        return (torch.softmax(-distance.square(), -1) * values).sum(-1)

    for dtype, near in ((torch.float64, 1e-6), (torch.float32, 2e-5)):
        found, wanted = [], []
        for function, into, kind in (
            (lambda z, v: soft_spline(z, v, -3.0, 3.0), found, dtype),
            (reference, wanted, torch.float64),
        ):
            x, v = z.to(kind, copy=True), values.to(kind, copy=True)
            x.requires_grad_(), v.requires_grad_()
            out = function(x, v)
            (out * weight.to(kind)).sum().backward()
            into += [out.detach().double(), x.grad.double(), v.grad.double()]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=near * float(other.abs().max()), rtol=near)


def test_soft_interpolation_is_a_softmax_over_the_knots_and_not_the_identity() -> None:
    z, values, knots = normal(50, scale=3), normal(5, seed=1), knot_positions(5, -3.0, 3.0)
    weights = np.exp(-(((z[:, None] - knots) / 1.5) ** 2).double().numpy())
    want = weights @ values.double().numpy() / weights.sum(1)
    np.testing.assert_allclose(soft_spline(z, values, -3.0, 3.0).numpy(), want, atol=1e-5)
    assert (soft_spline(z, knots, -3.0, 3.0) - z).abs().max() > 0.3


def test_old_faults_can_be_made_again() -> None:
    z = normal(200, scale=2)
    bent = LoraSpline(config(spline_init="bent"))
    offsets = bent.values.detach() - knot_positions(5, -3.0, 3.0)
    assert offsets.tolist() == [1.5 * BEND * sign for sign in (1, -1, 1, -1, 1)]
    assert (bent(torch.zeros(1)) - 1.5 * BEND).abs() < 1e-6  # garbled while B is still 0
    small = LoraSpline(config(output_scale_init=0.1))
    torch.testing.assert_close(small(z), 0.1 * z)
    squashed = LoraSpline(config(normalize="tanh"))
    torch.testing.assert_close(squashed(z), torch.tanh(z))


def test_a_gated_spline_can_leave_its_start() -> None:
    """With the identity behind a gate of 0 every gradient of the spline would be 0 for ever."""
    model = adapted(gated=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(own.gate.grad.abs() > 1e-6 for own in splines(model).values())
    stuck = adapted(gated=True, spline_init="identity")
    stuck(input_ids=IDS, labels=IDS).loss.backward()
    for own in splines(stuck).values():
        assert all(p.grad.abs().max() < 1e-6 for p in own.parameters())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_knots": 1}, "num_knots is 1; expected 2 or more"),
        ({"k_min": 3.0}, "k_min is 3.0; expected less than k_max, 3.0"),
        ({"boundary": "wrap"}, "boundary is 'wrap'; expected one of"),
        ({"interpolation_method": "cubic"}, "interpolation_method is 'cubic'"),
        ({"spline_init": "random"}, "spline_init is 'random'"),
        ({"spline_reg_weight": -1.0}, "spline_reg_weight is -1.0"),
        ({"space": "both"}, "space is 'both'"),
    ],
)
def test_bad_options_are_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**option)


@pytest.mark.parametrize("knots", [5, 6, 8, 11])
def test_the_identity_is_exact_on_a_bf16_base_whatever_the_grid(knots: int) -> None:
    base = tiny.model("llama", torch.bfloat16)
    config = LSLoraConfig(r=4, target_modules=["q_proj"], num_knots=knots)
    model = get_peft_model(base, config)
    splines = [m for n, m in model.named_modules() if n.endswith("lora_spline.default")]
    assert splines
    for made in splines:
        assert made.values.dtype == torch.float32
        grid = torch.arange(knots, dtype=torch.float32) * (6 / (knots - 1)) - 3
        assert torch.equal(made.values.detach(), grid)
        z = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16() * 4
        assert torch.equal(made(z), z)
