"""What bitsandbytes' quantisation leaves of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from loralab.errors import UserError


def fake_quantize(weight: Tensor, bits: int) -> Tensor:
    """W (out, in) through nf4 in blocks of 64 or int8 by rows, and back to fp32.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        raise UserError("quantisation needs bitsandbytes; pip install 'loralab[quant]'") from None
    if bits == 4:
        packed, state = bnb.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
        dense: Tensor = bnb.dequantize_4bit(packed, state)
        return dense.float()
    largest = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / largest * 127).round() * (largest / 127)
