"""Merged = unmerged and saved = reloaded, asked where B is not zero."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model

import starts
import tiny
from loralab.health import parity
from loralab.health.parity import ParityProbe

MODELS = {
    "lora": lambda: starts.peft_model(),
    "gpt2": lambda: starts.peft_model("gpt2"),
    "dora": lambda: starts.peft_model(use_dora=True),
    "rslora": lambda: starts.peft_model(use_rslora=True),
    "pissa": lambda: started("pissa"),
    "peft's own pissa": lambda: starts.peft_model(init_lora_weights="pissa"),
    "sine": lambda: starts.nonlinear_model("sine"),
    "spline": lambda: starts.nonlinear_model("spline"),
    "spline on weights": lambda: starts.nonlinear_model("spline", space="weight"),
    "loha": lambda: other(LoHaConfig(r=4, target_modules=["q_proj", "down_proj"])),
    "oft": lambda: other(OFTConfig(oft_block_size=8, target_modules=["q_proj"])),
    "ia3": lambda: other(IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
}


def started(name: str) -> Any:
    model = starts.peft_model()
    starts.start(model, name)
    return model


def other(config: Any) -> Any:
    return get_peft_model(tiny.model("llama"), config).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_sound_adapters_are_the_same_merged_and_reloaded(kind: str) -> None:
    values = ParityProbe().measure_model(MODELS[kind]())
    assert values["parity.reload"] == 0.0
    assert values["parity.keys_missing"] == 0.0
    # A spline on activations is no change of the weights.
    assert ("parity.merge" in values) == (kind != "spline")
    assert values.get("parity.merge", 0.0) < 1e-3


def test_sees_a_merge_that_is_not_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = starts.nonlinear_model("sine")
    variant = next(m.lora_variant["default"] for m in model.modules() if hasattr(m, "lora_variant"))
    true = type(variant).delta_weight
    monkeypatch.setattr(
        type(variant), "merge_safe", lambda self, layer, name, w: w + 1.05 * true(self, layer, name)
    )
    monkeypatch.setattr(
        type(variant),
        "merge_unsafe",
        lambda self, layer, name, w: setattr(w, "data", w.data + 1.05 * true(self, layer, name)),
    )
    assert ParityProbe().measure_model(model)["parity.merge"] == pytest.approx(0.05, rel=0.1)


def test_b_of_zero_does_not_hide_a_wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    model = starts.peft_model()
    assert not any(bool(pair.B.any()) for pair in starts.factors(model).values())
    true = peft.tuners.lora.Linear.get_delta_weight
    monkeypatch.setattr(
        peft.tuners.lora.Linear, "get_delta_weight", lambda self, name: 2 * true(self, name)
    )
    assert ParityProbe().measure_model(model)["parity.merge"] == pytest.approx(1.0, rel=1e-3)


def test_one_layer_of_another_scaling_is_merged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = starts.peft_model()
    layers = [layer for _, layer in parity.adapted_layers(model, "default")]
    odd = layers[len(layers) // 2]
    odd.scaling["default"] *= 2
    true = peft.tuners.lora.Linear.get_delta_weight

    def wrong(self: Any, name: str) -> Any:
        return true(self, name) * (1.5 if self.scaling[name] == odd.scaling[name] else 1.0)

    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", wrong)
    assert ParityProbe().measure_model(model)["parity.merge"] == pytest.approx(0.5, rel=1e-3)


def test_layers_that_only_values_tell_apart_are_merged_once_or_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[Any] = []
    true = parity._layer_difference
    monkeypatch.setattr(
        parity, "_layer_difference", lambda *given: looked.append(given) or true(*given)
    )
    model = other(LoraConfig(r=4, target_modules="all-linear"))
    ParityProbe().measure_model(model)
    layers = dict(parity.adapted_layers(model, "default"))
    assert len(layers) == 14
    # q and o alike, k and v, gate and up, down.
    assert len(looked) == 8
    kinds = {parity._kind(layer, "default") for layer in layers.values()}
    assert {parity._kind(layer, name) for layer, name, _ in looked} == kinds


def test_sees_a_save_that_drops_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = starts.nonlinear_model("spline")
    splines = sum("lora_spline" in name for name, _ in model.named_parameters())
    true = peft.peft_model.get_peft_model_state_dict

    def only_factors(*args: Any, **kwargs: Any) -> Any:
        return {k: t for k, t in true(*args, **kwargs).items() if "lora_A" in k or "lora_B" in k}

    monkeypatch.setattr(peft.peft_model, "get_peft_model_state_dict", only_factors)
    values = ParityProbe().measure_model(model)
    assert values["parity.keys_missing"] == splines > 0
    assert values["parity.reload"] > 1e-3


def test_what_a_file_lacked_is_told_instead() -> None:
    values = ParityProbe(missing=3, unexpected=0).measure_model(starts.peft_model())
    assert (values["parity.keys_missing"], values["parity.keys_unexpected"]) == (3.0, 0.0)
    assert ParityProbe().measure_model(tiny.model("llama")) == {}


@pytest.mark.parametrize("kind", ["lora", "pissa", "peft's own pissa", "sine", "spline"])
def test_looking_changes_nothing_and_repeats(kind: str) -> None:
    model = MODELS[kind]()
    starts.shake(model)
    model.train()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = {name: id(module) for name, module in model.named_modules()}
    wants = [p.requires_grad for p in model.parameters()]
    rng, logits = torch.get_rng_state(), starts.logits(model.eval())
    model.train()
    torch.set_rng_state(rng)
    first = ParityProbe().measure_model(model)
    assert first == ParityProbe().measure_model(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert wants == [p.requires_grad for p in model.parameters()]
    assert list(model.peft_config) == ["default"]
    assert {name: id(module) for name, module in model.named_modules()} == twin
    after = model.state_dict()
    assert after.keys() == kept.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in kept.items())
    assert torch.equal(starts.logits(model.eval()), logits)


def test_the_copy_shares_the_base_and_not_the_adapter() -> None:
    model = starts.peft_model()
    twin = parity._twin(model)
    for (name, own), (_, other_one) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert (own.data_ptr() == other_one.data_ptr()) == ("lora" not in name), name


def test_an_adapter_under_another_name() -> None:
    model = starts.peft_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    values = ParityProbe("second").measure_model(model)
    assert values["parity.reload"] == 0.0
    assert values["parity.merge"] < 1e-3
    assert list(model.peft_config) == ["default", "second"]
