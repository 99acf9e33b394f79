"""The weight of a linear module as a plain matrix, whatever stores it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.targets import weight_of


def dense_weight(module: Any) -> Tensor:
    """W (out, in) of nn.Linear, GPT-2's Conv1D or bitsandbytes' nf4 and int8 linear: an fp32 copy.

    PEFT's `dequantize_module_weight` is not enough on a CPU (bitsandbytes 0.50, PEFT 0.21): after a
    forward pass in evaluation mode nf4 weights may lie in another order (unless `loralab.load` made
    the model), which it reads as if they did not, and after it has read int8 weights the module's
    next forward fails. What is reordered has its scales in bf16, here too.
    """
    weight = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _nf4(weight)
    if kind == "Int8Params":
        scale = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
        rows: Tensor = weight.data.float() * (scale.float()[:, None] / 127)
        return rows
    dense = weight_of(module)
    if dense is None:
        raise TypeError(f"{type(module).__name__} is no linear module")
    return dense.to(torch.float32, copy=True)


def _nf4(weight: Any) -> Tensor:
    from bitsandbytes import functional

    packed, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # The inverse writes into the state it is given.
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
        if not state.nested:  # it leaves these scales as (blocks of a row, rows)
            state.absmax = state.absmax.T.reshape(-1).float()
    dense: Tensor = functional.dequantize_4bit(packed, state)
    return dense.to(torch.float32, copy=True)
