"""A frozen linear layer with an LS-LoRA update as one autograd operation.

    y = x W^T + b + f(z),    z = s (D x) A^T B^T,    f(z) = (1 - g) z + g o phi(i z)

As `lora_function.py`, with gz = gy f'(z) in the place of gy for the adapter's part. z is not
kept: backward makes it again from h (tokens, r), the same bits by the same product, and turns it
into gz while it sums what the spline's parameters need (`spline_curve.py`). On a processor with
bf16 products the kernel makes z itself, in registers and fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.adapters.spline import LoraSpline
from loralab.gradient import spline_curve
from loralab.gradient.lora_function import (
    Remade,
    drop,
    factor_gradients,
    in_autocast_type,
    keep_input,
)
from loralab.gradient.native.spline import kernel
from loralab.gradient.native.switch import wanted
from loralab.gradient.spline_curve import Parameters


def _bend(h: Tensor, b: Tensor, spline: Parameters) -> Tensor:
    """f(h B^T), (tokens, out)."""
    native = kernel() if wanted() else None
    if native is None or not native.takes(h, spline):
        return spline_curve.forward(h @ b.t(), spline.curve())
    if native.takes_product(h, b):
        return native.product_forward(h, b, spline)
    return native.forward(h @ b.t(), spline)


def _bend_gradients(h: Tensor, b: Tensor, gy: Tensor, spline: Parameters) -> tuple[Tensor, Tensor]:
    """gz (tokens, out) and the gradients of the spline's parameters, from gy."""
    native = kernel() if wanted() else None
    if native is None or not native.takes(h, spline):
        return spline_curve.backward(h @ b.t(), gy, spline.curve())
    if native.takes_product(h, b):
        return native.product_backward(h, b, gy, spline)
    return native.backward(h @ b.t(), gy, spline)


class LSLoraLinear(torch.autograd.Function):
    """The operation of this file's head on two-dimensional x; W and b get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
        values: Tensor,
        input_scale: Tensor,
        output_scale: Tensor,
        gate: Tensor | None,
        grid: tuple[float, float, bool],
        remade: Remade | None = None,
    ) -> Tensor:
        """y (tokens, out) in x's type. grid: k_min, k_max, whether clamped outside."""
        dtype = x.dtype
        dropped, mask = drop(x, dropout)
        h = (dropped @ a.to(dtype).t()).mul_(scaling)
        ctx.scaling, ctx.dropout, ctx.grid = scaling, dropout, grid
        spline = (values, input_scale, output_scale, gate)
        kept, again = keep_input(ctx, x, remade)
        ctx.save_for_backward(kept, mask, weight, a, b, h, *spline, *again)
        y = _bend(h, b.to(dtype), Parameters(*spline, *grid))
        if bias is not None:
            y += bias
        return y.addmm_(x, weight.to(dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A, B and the spline's parameters, each in its own type."""
        saved = ctx.saved_tensors
        b, h, *spline = saved[4:10]
        gy = gy.contiguous()
        gz, of_spline = _bend_gradients(h, b.to(gy.dtype), gy, Parameters(*spline, *ctx.grid))
        gx, ga, gb = factor_gradients(ctx, saved[:6], saved[10:], gy, gz)
        parts = of_spline.split_with_sizes([spline[0].shape[0], 1, 1, 1])
        gradients = [
            part.to(parameter.dtype) if needed else None
            for part, parameter, needed in zip(
                parts, spline, ctx.needs_input_grad[7:11], strict=True
            )
        ]
        return gx, None, None, ga, gb, None, None, *gradients, None, None


def ls_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    spline: LoraSpline,
    dropout: float = 0.0,
) -> Tensor:
    """y = x W^T + b + f(s dropout(x) A^T B^T), f the spline of one layer.

    x (..., in); weight (out, in) and bias (out,), both frozen; a (r, in); b (out, r);
    spline: piecewise, without the tanh. Returns (..., out) in x's type, or in autocast's where
    that is on; a, b and the spline may be fp32 beside a bf16 x.
    """
    with in_autocast_type(x) as cast:
        y: Tensor = LSLoraLinear.apply(  # type: ignore[no-untyped-call]
            cast.reshape(-1, x.shape[-1]),
            weight,
            bias,
            a,
            b,
            scaling,
            dropout,
            spline.values,
            spline.input_scale,
            spline.output_scale,
            spline.gate,
            (spline.k_min, spline.k_max, spline.boundary == "clamp"),
            Remade.of(x) if cast is x else None,
        )
    return y.view(*x.shape[:-1], weight.shape[0])
