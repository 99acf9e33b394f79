"""The operations of `native/layers.py` in PyTorch, where there is no kernel: any device, any type.

The same formulas with the same inputs kept, so that a step without a compiler needs hardly more
memory; each intermediate is a pass over (tokens, width) in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


class PlainLayers:
    """As `LayerKernels`, of tensors of any kind."""

    def norm_forward(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x weight / rms(x), and 1 / rms(x) (..., 1); x (..., d), weight (d,) in fp32 at least."""
        wide = _wide(x)
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (wide * inverse).mul_(weight).to(x.dtype), inverse

    def norm_backward(
        self, x: Tensor, weight: Tensor, inverse: Tensor, gy: Tensor, of_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and, in fp32 at least (d,), of the weight where it is wanted."""
        scaled = _wide(x) * inverse
        of_y = _wide(gy)
        sums = (of_y * scaled).flatten(0, -2).sum(dim=0) if of_weight else None
        of_scaled = of_y * weight
        along = (of_scaled * scaled).mean(-1, keepdim=True)
        return of_scaled.sub_(scaled.mul_(along)).mul_(inverse).to(x.dtype), sums

    def swiglu_forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        return silu(gate).mul_(up)

    def swiglu_backward(self, gate: Tensor, up: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up."""
        of_gate = torch.ops.aten.silu_backward(gy * up, gate)
        return of_gate, silu(gate).mul_(gy)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
