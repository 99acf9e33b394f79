"""The uniform grid of a spline, rounded alike wherever it is made."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def knot_positions(
    count: int, k_min: float, k_max: float, device: torch.device | None = None
) -> Tensor:
    """The uniform grid (count,) from k_min to k_max, in fp32.

    One multiplication and one addition each, and always in fp32, so that it is rounded alike
    everywhere: v = k has to stay exact on another device and in another type.
    """
    step = (k_max - k_min) / (count - 1)
    return torch.arange(count, dtype=torch.float32, device=device) * step + k_min


@lru_cache(maxsize=64)
def shared_knots(
    count: int, k_min: float, k_max: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """`knot_positions` as values of a type can hold it: one tensor for all splines of that grid.

    Not to be changed, and not to be part of a graph.
    """
    with torch.inference_mode(False), torch.no_grad():
        return knot_positions(count, k_min, k_max, device).to(dtype)
