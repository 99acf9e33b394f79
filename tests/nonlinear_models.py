"""Tiny models with a random adapter of each nonlinear kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import tiny
from loralab.adapters import LSLoraConfig, SineLoraConfig

MAKE: dict[str, Callable[..., Any]] = {
    "spline": LSLoraConfig,
    "gated": lambda **kw: LSLoraConfig(gated=True, **kw),
    "clamp": lambda **kw: LSLoraConfig(boundary="clamp", num_knots=4, **kw),
    "weight": lambda **kw: LSLoraConfig(space="weight", k_min=-1.0, k_max=1.0, **kw),
    "sine": lambda **kw: SineLoraConfig(sinelora_frequency=3.0, **kw),
}


every = pytest.mark.parametrize("kind", MAKE)


def config(kind: str, **options: Any) -> Any:
    return MAKE[kind](
        **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | options
    )


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, adapter: str = "default") -> None:
    """Every parameter of the adapter off its start, B too: with B = 0 most faults hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (0.3 * noise).to(parameter.dtype)


def adapted(kind: str, base: str = "llama", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)  # PEFT draws A
    model = get_peft_model(tiny.model(base), config(kind, **options))
    randomise(model, seed)
    return model.eval()


def tokens(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(4, 67, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=tokens(), **kwargs).logits
    return out
