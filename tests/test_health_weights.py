"""What an adapter does to the weights, measured without its product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model

import starts
import tiny
from loralab.health.weights import (
    WeightProbe,
    dense_change,
    intruders,
    not_finite,
    spectral_norm,
)


def lora(kind: str = "llama", **options: Any) -> Any:
    model = starts.peft_model(kind, **options)
    starts.shake(model)
    return model


def started(name: str) -> Any:
    model = starts.peft_model()
    starts.start(model, name)
    return model


def base_weights(model: Any, kind: str = "llama") -> dict[str, torch.Tensor]:
    """W (out, in) of the model before any adapter, in fp64."""
    bare = tiny.model(kind)
    modules = dict(bare.named_modules())
    found = {}
    for name in starts.layers(model):
        name = name.removeprefix("base_model.model.")
        weight = modules[name].weight.detach().double()
        found[name] = weight.T if kind == "gpt2" else weight
    return found


def reference(model: Any, kind: str = "llama") -> dict[str, dict[str, float]]:
    """The same numbers from dense products and full decompositions, in fp64."""
    told = {}
    for name, weight in base_weights(model, kind).items():
        layer = model.base_model.model.get_submodule(name)
        a = layer.lora_A["default"].weight.detach().double()
        b = layer.lora_B["default"].weight.detach().double()
        now = layer.get_base_layer().weight.detach().double()
        delta = layer.scaling["default"] * b @ a + (now.T if kind == "gpt2" else now) - weight
        s, size = torch.linalg.svdvals(delta), delta.norm()
        shares = s[s > 1e-9] / s.sum()
        told[name] = {
            "delta_ratio": float(size / weight.norm()),
            "spectral_ratio": float(s[0] / torch.linalg.svdvals(weight)[0]),
            "effective_rank": float(torch.exp(-(shares * shares.log()).sum())),
            "stable_rank": float((size / s[0]) ** 2),
            "base_share": float((delta * weight).sum() / size**2)
            if size / weight.norm() * weight.numel() ** 0.5 > 10
            else 0.0,
        }
    return told


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_measures_what_dense_products_give(kind: str) -> None:
    model = lora(kind)
    starts.shake(model, 0.1)
    found, wanted = WeightProbe().modules(model), reference(model, kind)
    assert found.keys() == wanted.keys()
    for name, row in wanted.items():
        for key, value in row.items():
            close = 0.02 if key == "spectral_ratio" else 1e-5
            assert getattr(found[name], key) == pytest.approx(value, rel=close, abs=1e-6), key


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_measures_the_change_of_the_true_base(start: str) -> None:
    model = started(start)
    assert WeightProbe().measure_model(model)["weights.delta_ratio.max"] < 1e-5
    starts.shake(model, 0.02)
    found, wanted = WeightProbe().modules(model), reference(model)
    for name, row in wanted.items():
        assert found[name].delta_ratio == pytest.approx(row["delta_ratio"], rel=1e-3)


def test_a_rank_beyond_the_module_is_measured_too() -> None:
    model = lora(rank=70)
    for name, row in reference(model).items():
        assert WeightProbe().modules(model)[name].stable_rank == pytest.approx(row["stable_rank"])


def test_tells_a_part_of_the_base_from_what_was_learned() -> None:
    learned = WeightProbe().measure_model(lora())
    assert abs(learned["weights.base_share"]) < 0.2
    # PiSSA's factors on a base from which they were not taken out.
    model = started("pissa")
    factors = starts.factors(model)
    naive = starts.peft_model()
    with torch.no_grad():
        for name, pair in starts.factors(naive).items():
            for own, other in zip(pair, factors[name], strict=True):
                own.copy_(other)
    assert WeightProbe().measure_model(naive)["weights.base_share"] == pytest.approx(1, abs=1e-3)
    starts.shake(naive, 0.02)
    assert WeightProbe().measure_model(naive)["weights.base_share"] > 0.7


def test_counts_the_idle_the_dead_and_what_is_no_number() -> None:
    model = starts.peft_model()
    at_start = WeightProbe().measure_model(model)
    assert (at_start["weights.idle"], at_start["weights.dead"]) == (1.0, 0.0)
    starts.shake(model)
    moved = WeightProbe().measure_model(model)
    assert (moved["weights.idle"], moved["weights.dead"], moved["weights.nan"]) == (0.0, 0.0, 0.0)
    names = list(starts.factors(model))
    with torch.no_grad():
        for factor in starts.factors(model)[names[0]]:
            factor.zero_()
        starts.factors(model)[names[1]].B[0, 0] = float("inf")
        starts.factors(model)[names[2]].A[1, 1] = float("nan")
    broken = WeightProbe().measure_model(model)
    assert broken["weights.dead"] == pytest.approx(1 / len(names))
    assert broken["weights.nan"] == 2.0
    assert broken["weights.delta_ratio.max"] != broken["weights.delta_ratio.max"]
    told = not_finite(model, "default")
    assert [name.rpartition(".lora_")[0] for name in told] == [
        n.removeprefix("base_model.model.") for n in names[1:3]
    ]


def test_intruders_are_new_directions_and_not_grown_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    u, s, vt = torch.linalg.svd(weight)
    grown = 5 * s[0] * torch.outer(u[:, 3], vt[3])
    assert intruders(weight, grown) == 0
    new = torch.linalg.qr(torch.randn(96, 96, generator=generator)).Q[:, 0]
    old = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q[:, 0]
    assert intruders(weight, 5 * s[0] * torch.outer(new, old)) == 1
    assert intruders(weight.T, 5 * s[0] * torch.outer(old, new)) == 1
    model = lora()
    looked = [
        r for r in WeightProbe(intruders=3).modules(model).values() if r.intruders is not None
    ]
    assert len(looked) == 3


def test_spectral_norm_is_near_the_largest_singular_value() -> None:
    generator = torch.Generator().manual_seed(1)
    for shape in [(64, 300), (300, 64), (2, 50)]:
        dense = torch.randn(*shape, generator=generator)
        exact = float(torch.linalg.svdvals(dense)[0])
        assert exact * 0.98 < spectral_norm(dense) <= exact * 1.0001


@pytest.mark.parametrize("kind", ["sine", "spline"])
def test_nonlinear_adapters(kind: str) -> None:
    space = {"space": "weight"} if kind == "spline" else {}
    model = starts.nonlinear_model(kind, **space)
    starts.shake(model)
    values = WeightProbe().measure_model(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    change = layer.lora_variant["default"].delta_weight(layer, "default").detach()
    weight = layer.get_base_layer().weight.detach()
    assert torch.equal(dense_change(layer, "default"), change)
    one = WeightProbe().modules(model)["model.layers.0.self_attn.q_proj"]
    assert one.delta_ratio == pytest.approx(float(change.norm() / weight.norm()), rel=1e-5)
    assert ("spline.deviation" in values) == (kind == "spline")


def test_a_spline_on_activations_has_no_change_of_weights_but_diagnostics() -> None:
    model = starts.nonlinear_model("spline")
    assert WeightProbe().measure_model(model)["spline.deviation"] == 0.0
    with torch.no_grad():
        layers = [m for m in model.modules() if hasattr(m, "lora_spline")]
        layers[0].lora_spline["default"].values[0] += 2.0
        layers[1].lora_spline["default"].output_scale.fill_(0.1)
    values = WeightProbe().measure_model(model)
    assert values["spline.deviation"] > 0.1
    assert values["spline.output_scale"] == pytest.approx(0.1)
    assert "weights.delta_ratio.max" not in values
    assert values["weights.nan"] == 0.0


def test_a_spline_behind_a_closed_gate_deviates_from_nothing() -> None:
    model = starts.nonlinear_model("spline", gated=True)
    splines = [m.lora_spline["default"] for m in model.modules() if hasattr(m, "lora_spline")]
    assert bool((splines[0].values != splines[0].knots()).any())
    assert WeightProbe().measure_model(model)["spline.deviation"] == 0.0
    with torch.no_grad():
        splines[0].gate.fill_(0.5)
    assert WeightProbe().measure_model(model)["spline.deviation"] > 0.0


@pytest.mark.parametrize("config", [LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False)])
def test_other_types_are_seen_through_their_dense_change(config: Any) -> None:
    model = get_peft_model(tiny.model("llama"), config)
    values = WeightProbe().measure_model(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    change, weight = layer.get_delta_weight("default"), layer.get_base_layer().weight
    assert values["weights.delta_ratio.max"] >= float(change.norm() / weight.norm()) * 0.9999


def test_what_has_no_change_of_weights_still_counts_nan() -> None:
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    model = get_peft_model(tiny.model("llama"), config)
    assert WeightProbe().measure_model(model)["weights.nan"] == 0.0
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "ia3" in n).fill_(float("nan"))
    assert WeightProbe().measure_model(model)["weights.nan"] == 1.0
    assert WeightProbe().measure_model(tiny.model("llama")) == {}


def test_looking_changes_nothing_and_repeats() -> None:
    model = started("pissa")
    starts.shake(model)
    model.train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    rng, wants = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    first = WeightProbe(intruders=2).measure_model(model)
    assert first == WeightProbe(intruders=2).measure_model(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [p.requires_grad for p in model.parameters()] == wants
    assert model.training
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_bf16_is_measured_in_fp32() -> None:
    model = get_peft_model(
        tiny.model("llama", torch.bfloat16), LoraConfig(r=4, target_modules="all-linear")
    )
    starts.shake(model)
    values = WeightProbe().measure_model(model)
    assert 0 < values["weights.delta_ratio.mean"] < 10
