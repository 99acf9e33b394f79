"""What can be read off a model and its optimiser without running either."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, log, sqrt
from typing import Any

import torch
from torch import Tensor, nn

_ORTHONORMAL = 0.05


def setup_values(model: nn.Module, optimizer: Any = None) -> dict[str, float]:
    """Facts as numbers; what does not apply to the model is left out.

    setup.left_out: share of trainable tensors that the optimiser does not hold.
    setup.scaling: the largest |ln(scaling / (alpha / r))| of a LoRA layer, alpha / sqrt r with
        rslora; left out while a progressive start lets it rise.
    setup.unprepared: 1 where the config names a start made from data and the factors are those of
        plain LoRA (PEFT falls back without a word), else 0. Of a model before its first step.
    """
    return {
        **_left_out(model, optimizer),
        **_scaling(model),
        **_unprepared(model),
    }


def _left_out(model: nn.Module, optimizer: Any) -> dict[str, float]:
    groups = getattr(optimizer, "param_groups", None)
    if not groups:
        return {}
    held = {id(parameter) for group in groups for parameter in group["params"]}
    trainable = [p for p in model.parameters() if p.requires_grad]
    known = {id(p) for p in model.parameters()}
    # Sharded training puts parameters of its own making into the optimiser: nothing to compare.
    if not trainable or (held and not held & known):
        return {}
    return {"setup.left_out": sum(id(p) not in held for p in trainable) / len(trainable)}


def _scaling(model: nn.Module) -> dict[str, float]:
    from loralab.adapters.inits.progressive import callback_for

    if callback_for(model) is not None:
        return {}
    off = [_off(layer, name) for layer, name in _lora_layers(model)]
    return {"setup.scaling": max(off)} if off else {}


def _off(layer: Any, adapter: str) -> float:
    rank, alpha, scaling = layer.r[adapter], layer.lora_alpha[adapter], layer.scaling[adapter]
    rslora = getattr(layer, "use_rslora", {})
    rooted = rslora.get(adapter, False) if isinstance(rslora, dict) else bool(rslora)
    meant = alpha / (sqrt(rank) if rooted else rank)
    return abs(log(scaling / meant)) if scaling * meant > 0 else (0.0 if scaling == meant else inf)


def _unprepared(model: nn.Module) -> dict[str, float]:
    configs = getattr(model, "peft_config", {})
    for layer, name in _lora_layers(model):
        start = getattr(configs.get(name), "init_lora_weights", None)
        if start == "eva":
            a = layer.lora_A[name].weight.detach().float()
            gram = a @ a.T
            away = float((gram - torch.eye(len(gram), device=gram.device)).abs().max())
            return {"setup.unprepared": float(away > _ORTHONORMAL and _zero_b(layer, name))}
        if start == "lora_ga":
            return {"setup.unprepared": float(_zero_b(layer, name))}
    return {}


def _zero_b(layer: Any, adapter: str) -> bool:
    weight: Tensor = layer.lora_B[adapter].weight
    return not bool(weight.any())


def _lora_layers(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Layers of LoRA's form with the names of their adapters."""
    for module in model.modules():
        factors = getattr(module, "lora_A", None)
        if isinstance(factors, nn.ModuleDict) and hasattr(module, "scaling"):
            scalings: Any = module.scaling
            for name in factors:
                if name in scalings:
                    yield module, name
