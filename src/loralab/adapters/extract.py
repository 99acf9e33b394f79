"""A PEFT model's adapter as plain tensors, relative to the true base."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from loralab.adapters.state import AdapterState, Factors
from loralab.adapters.true_base import memory_of
from loralab.errors import UserError

_PREFIX = "base_model.model."


def state_of(
    model: PeftModel, adapter: str = "default", dtype: Any = torch.float32
) -> AdapterState:
    """The adapter's factors, copied. Where its start was taken out of W, the rank doubles.

    There W + dW = (W - s B0 A0) + s B A, so on the true base dW = s [B, -B0] [A; A0]
    (as PEFT converts PiSSA; arXiv:2404.02948, appendix C). One scaling for all modules is made
    by folding what a module's own differs by into B.

    Raises:
        UserError: there is no such adapter, or it is not expressible as a LoRA of linear modules.
    """
    factors: dict[str, Factors] = {}
    kind = str(getattr(model.peft_config.get(adapter), "peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        raise UserError(
            f"adapter {adapter!r} is {kind}, which two factors alone do not hold; "
            "`loralab export` can merge or approximate it"
        )
    scalings = [
        m.scaling[adapter] for m in model.modules() if _adapted(m, adapter) and m.scaling[adapter]
    ]
    scaling = float(scalings[0]) if scalings else 1.0
    for path, layer in model.named_modules():
        if not _adapted(layer, adapter):
            continue
        if adapter not in layer.lora_A or layer.lora_variant.get(adapter) is not None:
            raise UserError(f"{path}: not a plain LoRA of a linear module")
        a = layer.lora_A[adapter].weight.detach().to("cpu", dtype, copy=True)
        b = layer.lora_B[adapter].weight.detach().to("cpu", dtype, copy=True)
        b = b * (float(layer.scaling[adapter]) / scaling)
        memory = memory_of(layer)
        if memory is not None:
            if memory.A0 is None or memory.B0 is None or memory.adapter != adapter:
                raise UserError(
                    f"{path}: its base weight was replaced, not only split; save the base with the "
                    "adapter (model.get_base_model().save_pretrained)"
                )
            a = torch.cat([a, memory.A0.to(dtype)], 0)
            b = torch.cat([b, -memory.B0.to(dtype)], 1)
        factors[path.removeprefix(_PREFIX)] = Factors(a.contiguous(), b.contiguous())
    if not factors:
        raise UserError(f"the model has no LoRA adapter {adapter!r}")
    base = getattr(model.peft_config[adapter], "base_model_name_or_path", None)
    return AdapterState(factors, scaling, base=base)


def _adapted(module: nn.Module, adapter: str) -> bool:
    return isinstance(module, LoraLayer) and adapter in module.r
