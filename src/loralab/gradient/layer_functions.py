"""RMSNorm, SwiGLU and rotary attention, each one autograd operation on native kernels.

In PyTorch each of them is a chain of passes over (tokens, width), in fp32 copies for the norm, and
autograd keeps what lies between. Here each reads its inputs once, works in fp32, rounds once, and
keeps its inputs alone: 1 / rms of each token for the norm, the logarithm of each softmax's sum for
attention. Formulas are in `native/layers.cpp` and `native/attention.cpp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.gradient.native.attention import AttentionKernel
from loralab.gradient.native.layers import LayerKernels


class RMSNorm(torch.autograd.Function):
    """x w / sqrt(mean(x^2) + eps); x (..., d), w (d,) of one type."""

    @staticmethod
    def forward(ctx: Any, native: LayerKernels, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = weight.detach().float()
        y, inverse = native.norm_forward(x, wide, eps)
        ctx.native = native
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        of_x, of_weight = ctx.native.norm_backward(
            x, weight.detach().float(), inverse, gy.contiguous(), ctx.needs_input_grad[2]
        )
        return None, of_x, None if of_weight is None else of_weight.to(weight.dtype), None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, of one shape and type."""

    @staticmethod
    def forward(ctx: Any, native: LayerKernels, gate: Tensor, up: Tensor) -> Tensor:
        ctx.native = native
        ctx.save_for_backward(gate, up)
        return native.swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = ctx.native.swiglu_backward(gate, up, gy.contiguous())
        return None, of_gate, of_up


class Rotation(torch.autograd.Function):
    """Rotary positions: x (tokens, heads, d) turned by cos, sin (tokens, d / 2) float32."""

    @staticmethod
    def forward(ctx: Any, native: LayerKernels, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.native = native
        ctx.save_for_backward(cos, sin)
        return native.rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, ctx.native.rotate(gy.contiguous(), cos, sin, back=True), None, None


class RotaryAttention(torch.autograd.Function):
    """Causal attention within each sequence, of queries and keys that it rotates itself.

    q (tokens, heads, d); k, v (tokens, key heads, d), bf16; cos, sin (tokens, d / 2) float32.
    Rotated queries and keys are made again in backward, not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        native: LayerKernels,
        kernel: AttentionKernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        lengths: Sequence[int],
    ) -> Tensor:
        turned = [native.rotate(t, cos, sin) for t in (q, k)]
        out, sums = kernel.forward(turned[0], turned[1], v, scale, lengths)
        ctx.native, ctx.kernel, ctx.scale, ctx.lengths = native, kernel, scale, lengths
        ctx.save_for_backward(q, k, v, cos, sin, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, out, sums = ctx.saved_tensors
        turned = [ctx.native.rotate(t, cos, sin) for t in (q, k)]
        of_q, of_k, of_v = ctx.kernel.backward(
            turned[0], turned[1], v, ctx.scale, ctx.lengths, out, sums, gy.contiguous()
        )
        of_q, of_k = (ctx.native.rotate(t, cos, sin, back=True) for t in (of_q, of_k))
        return None, None, of_q, of_k, of_v, None, None, None, None
