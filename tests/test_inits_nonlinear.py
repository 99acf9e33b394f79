"""Starts of adapters that compute another function of B A: taken where true, else refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from loralab.adapters.interop.nonlinear import open_nonlinear
from loralab.errors import UserError
from starts import (
    ALPHA,
    RANK,
    SPLITTING,
    layers,
    logits,
    nonlinear_model,
    shake,
    start,
)

NEEDS_PLAIN = (*SPLITTING, "loftq", "mica", "svd_delta", "quantization_match", "output_match",
               "orthogonal_negative")  # fmt: skip


@pytest.mark.parametrize("name", [*NEEDS_PLAIN, "warm_start"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sine", {}),
        ("spline", {"interpolation_method": "soft"}),
        ("spline", {"normalize": "tanh"}),
        ("spline", {"output_scale_init": 0.5}),
        ("spline", {"spline_init": "bent"}),
        ("spline", {"spline_init": "bent", "space": "weight"}),
        ("spline", {"boundary": "clamp"}),
    ],
)
def test_a_start_that_rests_on_dw_being_s_ba_is_refused_elsewhere(
    kind: str, options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    model = nonlinear_model(kind, **options)
    shake(model)
    before = logits(model)
    given: dict[str, Any] = {"path": str(tmp_path)} if name == "warm_start" else {}
    if name in ("svd_delta", "quantization_match"):
        given = {"reference": tiny.model("llama", seed=1)}
    with pytest.raises(UserError, match=rf"{name} (needs dW = s BA|is for plain LoRA)"):
        start(model, name, **given)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"space": "weight"}])
def test_a_spline_that_is_the_identity_takes_what_plain_lora_takes(options: Any) -> None:
    model = nonlinear_model("spline", **options)
    plain = get_peft_model(
        tiny.model("llama"),
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"]),
    ).eval()
    for made in (model, plain):
        start(made, "svd_delta", reference=tiny.model("llama", seed=1))
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_spline["default"].values.add_(0.5)
            if options.get("gated"):
                layer.lora_spline["default"].gate.add_(1)
    with pytest.raises(UserError, match="needs dW"):
        start(model, "svd_delta", reference=tiny.model("llama", seed=1))


@pytest.mark.parametrize("kind", ["sine", "spline"])
@pytest.mark.parametrize("name", [*SPLITTING, "loftq", "mica"])
def test_what_could_not_be_saved_afterwards_is_refused_before(name: str, kind: str) -> None:
    model = nonlinear_model(kind)
    with pytest.raises(UserError, match=f"{name} is for plain LoRA.*cannot be saved"):
        start(model, name)
    start(model, "zero_b")
    start(model, "eva")
    assert torch.equal(logits(model), logits(tiny.model("llama")))


def test_progressive_refuses_for_its_start_as_well() -> None:
    with pytest.raises(UserError, match="start orthogonal_negative needs dW"):
        start(nonlinear_model("sine"), "progressive", start="orthogonal_negative")


@pytest.mark.parametrize("mark", ["pissa", "PISSA_niter_4", "olora", "corda", "lora_ga", "loftq"])
@pytest.mark.parametrize("kind", ["sine", "spline"])
def test_a_nonlinear_adapter_of_a_changed_base_is_not_opened(
    kind: str, mark: str, tmp_path: Path
) -> None:
    nonlinear_model(kind).save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    open_nonlinear(tmp_path, config, tiny.model("llama"))
    with pytest.raises(UserError, match=f"init_lora_weights is '{mark}'.*base"):
        open_nonlinear(tmp_path, config | {"init_lora_weights": mark}, tiny.model("llama"))
