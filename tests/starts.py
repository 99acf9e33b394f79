"""Small PEFT models to start, and what is looked at in them afterwards."""

from __future__ import annotations

import random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tiny
from loralab.adapters import LSLoraConfig, SineLoraConfig
from loralab.adapters.inits import initialize
from loralab.adapters.state import Factors

RANK, ALPHA = 4, 8.0
EVERY_TYPE = "all-linear"
SPLITTING = ("pissa", "olora", "corda", "lora_ga")


def texts(count: int = 8, words: int = 40, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    pairs = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    return [" ".join(draw.choice(pairs) for _ in range(words)) for _ in range(count)]


def peft_model(kind: str = "llama", rank: int = RANK, **options: Any) -> Any:
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=EVERY_TYPE, **options)
    return get_peft_model(tiny.model(kind), config).eval()


def nonlinear_model(kind: str, **options: Any) -> Any:
    made = {"sine": SineLoraConfig, "spline": LSLoraConfig}[kind]
    config = made(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], **options)
    return get_peft_model(tiny.model("llama"), config).eval()


def start(model: Any, name: str, **options: Any) -> Any:
    return initialize(model, name, tokenizer=tiny.tokenizer(), texts=texts(), **options)


def ids(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, tiny.VOCABULARY, (2, 17), generator=generator)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=ids()).logits  # type: ignore[no-any-return]


def layers(model: Any) -> dict[str, Any]:
    return {
        n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A
    }


def factors(model: Any) -> dict[str, Factors]:
    return {
        name: Factors(m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach())
        for name, m in layers(model).items()
    }


def shake(model: Any, size: float = 0.05) -> None:
    """Move every factor, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for pair in factors(model).values():
            for factor in pair:
                factor += size * torch.randn(factor.shape, generator=generator)
