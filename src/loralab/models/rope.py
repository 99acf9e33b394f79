"""Rotary positions (RoPE, arXiv:2104.09864), halves of a head rotated against each other.

    f_i = theta^(-2i/d),  rot(x, t) = x cos(t f) + (-x_2, x_1) sin(t f)

so that rot(q, t) . rot(k, s) depends on t - s alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (..., head_dim), float32, of positions (...)."""
    halves = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (halves / head_dim)
    turned = positions[..., None].float() * frequencies
    turned = torch.cat([turned, turned], dim=-1)
    return turned.cos(), turned.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (rows, heads, tokens, head_dim); cos, sin (rows or none, tokens, head_dim) as `angles`."""
    cos, sin = (t.to(x.dtype).unsqueeze(-3) for t in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
