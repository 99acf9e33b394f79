"""Tiny models with a random LS-LoRA adapter."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor

import tiny
from loralab.adapters import LSLoraConfig
from loralab.adapters.spline_diagnostics import (
    splines,
)

IDS = torch.randint(4, 67, (4, 7), generator=torch.Generator().manual_seed(1))


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(**options: Any) -> LSLoraConfig:
    return LSLoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | options
    )


def adapted(base: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(base or tiny.model("llama"), config(**options))
    randomise_b(model)
    return model.eval()


@torch.no_grad()
def randomise_b(model: Any) -> None:
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            parameter.copy_(normal(*parameter.shape, seed=index, scale=0.3))


@torch.no_grad()
def bend(model: Any, scale: float = 0.4) -> None:
    for index, own in enumerate(splines(model).values()):
        own.values += normal(*own.values.shape, seed=index, scale=scale)


def rows(count: int = 8) -> Dataset:
    ids = torch.randint(4, 67, (count, 6), generator=torch.Generator().manual_seed(3)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * 6] * count})
