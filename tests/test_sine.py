"""SineLoRA beyond what test_nonlinear.py asks of every adapter."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

import tiny
from loralab.adapters import SineLoraConfig
from loralab.errors import UserError


def layer_of(**options: Any) -> Any:
    torch.manual_seed(0)
    config = SineLoraConfig(r=2, lora_alpha=6, target_modules=["down_proj"], **options)
    model = get_peft_model(tiny.model("llama"), config)
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    return layer


def product(layer: Any) -> Tensor:
    b, a = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
    return b.double() @ a.double()


@pytest.mark.parametrize(("gain", "used"), [(None, sqrt(88)), (7.0, 7.0)])
def test_gain_divides_and_defaults_to_the_root_of_the_inputs(gain: Any, used: float) -> None:
    layer = layer_of(sinelora_frequency=50.0, sinelora_scaling=gain)
    want = 3.0 * torch.sin(50.0 * product(layer)) / used
    torch.testing.assert_close(layer.get_delta_weight("default").double(), want, atol=1e-5, rtol=0)


def test_sine_raises_the_rank() -> None:
    layer = layer_of(sinelora_frequency=200.0)
    assert torch.linalg.matrix_rank(product(layer)) == 2
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default").detach()) > 30


def test_phase_is_exact_under_autocast_to_bf16() -> None:
    """A product rounded to bf16 would be off by whole radians at this frequency."""
    layer = layer_of(sinelora_frequency=2000.0)
    x = torch.randn(4, 88)
    with torch.no_grad():
        change = layer(x) - layer.get_base_layer()(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = (layer(x) - layer.get_base_layer()(x)).float()
    assert (low - change).norm() / change.norm() < 0.05


@pytest.mark.parametrize("name", ["sinelora_frequency", "sinelora_scaling"])
def test_bad_options_are_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 0; expected a positive number"):
        SineLoraConfig(**{name: 0})
