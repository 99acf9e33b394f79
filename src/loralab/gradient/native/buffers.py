"""Memory that the kernels write into: what they take it to be, whatever PyTorch's defaults are."""

from __future__ import annotations

import torch
from torch import Tensor


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the CPU, not filled."""
    return torch.empty(shape, dtype=dtype, device="cpu")
