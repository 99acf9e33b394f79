"""A PEFT model's adapter as plain tensors, relative to the true base."""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from loralab.adapters.factors import PEFT_PREFIX, Factors
from loralab.adapters.state import AdapterState
from loralab.adapters.true_base import memory_of
from loralab.errors import UserError


def state_of(model: PeftModel, adapter: str = "default") -> AdapterState:
    """The adapter's factors, fp32 copies. Where its start was taken out of W, the rank doubles.

    There W + dW = (W - s B0 A0) + s B A, so on the true base dW = s [B, -B0] [A; A0]
    (as PEFT converts PiSSA; arXiv:2404.02948, appendix C). One scaling for all modules is made
    by folding what a module's own differs by into B.

    Raises:
        UserError: there is no such adapter, or it is not expressible as a LoRA of linear modules.
    """
    own, taken = parts_of(model, adapter)
    return own if taken is None else minus(own, taken)


def minus(own: AdapterState, taken: AdapterState) -> AdapterState:
    """The adapter whose change of W is that of `own` less that of `taken`; equal scalings."""
    if own.scaling != taken.scaling:
        raise ValueError(f"scalings differ: {own.scaling} and {taken.scaling}")
    factors = {}
    for name, (a, b) in own.factors.items():
        a0, b0 = taken.factors[name]
        factors[name] = Factors(torch.cat([a, a0], 0), torch.cat([b, -b0], 1))
    return replace(own, factors=factors)


def parts_of(
    model: PeftModel, adapter: str = "default"
) -> tuple[AdapterState, AdapterState | None]:
    """The adapter as it runs, and what its start took out of W, None where it took nothing.

    Raises:
        UserError: as `state_of`.
    """
    kind = str(getattr(model.peft_config.get(adapter), "peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        raise UserError(
            f"adapter {adapter!r} is {kind}, which two factors alone do not hold; "
            "`loralab export` can merge or approximate it"
        )
    layers = {p.removeprefix(PEFT_PREFIX): m for p, m in model.named_modules() if _has(m, adapter)}
    if not layers:
        raise UserError(f"the model has no LoRA adapter {adapter!r}")
    scaling = next((float(m.scaling[adapter]) for m in layers.values() if m.scaling[adapter]), 1.0)
    own: dict[str, Factors] = {}
    taken: dict[str, Factors] = {}
    for name, layer in layers.items():
        if adapter not in layer.lora_A or layer.lora_variant.get(adapter) is not None:
            raise UserError(f"{name}: not a plain LoRA of a linear module")
        share = float(layer.scaling[adapter]) / scaling
        own[name] = _copied(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, share)
        memory = memory_of(layer)
        if memory is not None:
            if memory.A0 is None or memory.B0 is None or memory.adapter != adapter:
                raise UserError(
                    f"{name}: its base weight was replaced, not only split; save the base with the "
                    "adapter (model.get_base_model().save_pretrained)"
                )
            taken[name] = _copied(memory.A0, memory.B0, share)
    base = getattr(model.peft_config[adapter], "base_model_name_or_path", None)
    state = AdapterState(own, scaling, base=base)
    return state, replace(state, factors=taken) if taken else None


def _copied(a: torch.Tensor, b: torch.Tensor, share: float) -> Factors:
    a, b = (x.detach().to("cpu", torch.float32, copy=True).contiguous() for x in (a, b))
    return Factors(a, b * share)


def _has(module: nn.Module, adapter: str) -> bool:
    return isinstance(module, LoraLayer) and adapter in module.r
