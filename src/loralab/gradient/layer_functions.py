"""RMSNorm, SwiGLU and rotary attention, each one autograd operation.

Written out, each is a chain of passes over (tokens, width), in fp32 copies for the norm, and
autograd keeps what lies between. Here each reads its inputs once, works in fp32, rounds once, and
keeps its inputs alone: 1 / rms of each token for the norm, the logarithm of each softmax's sum for
attention. Outputs of the norm and of SwiGLU say how they are made, so that fused LoRA layers need
not keep them. Formulas are in `native/layers.cpp` and `native/attention.cpp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.gradient.lora_function import Remade
from loralab.gradient.native.attention import AttentionKernel
from loralab.gradient.native.layers import LayerKernels
from loralab.gradient.plain_layers import PlainLayers

Layers = LayerKernels | PlainLayers


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Layers, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = layers.norm_forward(x, _wide(weight), eps)
        ctx.layers = layers
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        of_x, of_weight = ctx.layers.norm_backward(
            x, _wide(weight), inverse, gy.contiguous(), ctx.needs_input_grad[2]
        )
        return None, of_x, None if of_weight is None else of_weight.to(weight.dtype), None


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def rms_norm(layers: Layers, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x w / sqrt(mean(x^2) + eps); x (..., d), w (d,) of one type."""
    y: Tensor = _RMSNorm.apply(layers, x, weight, eps)  # type: ignore[no-untyped-call]

    def make(x: Tensor, weight: Tensor) -> Tensor:
        return layers.norm_forward(x, _wide(weight), eps)[0]

    return Remade.mark(y, make, x, weight)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Layers, gate: Tensor, up: Tensor) -> Tensor:
        ctx.layers = layers
        ctx.save_for_backward(gate, up)
        return layers.swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = ctx.layers.swiglu_backward(gate, up, gy.contiguous())
        return None, of_gate, of_up


def swiglu(layers: Layers, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and type."""
    y: Tensor = _SwiGLU.apply(layers, gate, up)  # type: ignore[no-untyped-call]
    return Remade.mark(y, layers.swiglu_forward, gate, up)


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
