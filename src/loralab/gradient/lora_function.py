"""A frozen linear layer with a LoRA update as one autograd operation.

    y = x W^T + b + s (D x A^T) B^T,   D the dropout mask over 1 - p

Shapes: x (tokens, in), W (out, in), A (r, in), B (out, r), gy = dL/dy (tokens, out). Backward:

    gB = gy^T h,   gh = s gy B,   gA = gh^T (D x),   gx = gy W + D gh A,   h = s (D x) A^T

Autograd through PEFT's three layers does the same sums and keeps more: the input once more (in
fp32 where the adapter is fp32), both products, and passes of size (tokens, out) for the scaling
and the addition. Here the input is kept once, the scaling multiplies (tokens, r), and both
additions happen inside a matrix product.

The adapter's part is written first and x W^T is added to it inside the product, whose
accumulator is fp32. Rounding x W^T first, as PEFT does, loses an update that is under half a unit
in its last place; here the update itself is rounded to x's type on the way, which is nearer to
fp32 as long as it is smaller than x W^T.

Hu et al. 2021, https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Again:
    """Makes a tensor again in backward, once for all the layers that read it."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self._readers = self._waiting = 0
        self._made: Tensor | None = None

    def promise(self) -> None:
        """One more layer will ask."""
        self._readers += 1

    def __call__(self, *tensors: Tensor) -> Tensor:
        """make(*tensors), held until each layer that promised to has asked."""
        if self._made is None:
            self._made, self._waiting = self._make(*tensors), self._readers
        made = self._made
        self._waiting -= 1
        if self._waiting <= 0:
            self._made = None
        return made


class Remade(NamedTuple):
    """How backward makes a tensor in place of keeping it: `again` of tensors it keeps anyway.

    What makes an input that is wide and cheap to make (a norm, an activation) marks it with this,
    and the layers that read it keep `tensors`. They are not in `again`, which outlives their use.
    """

    again: Again
    tensors: tuple[Tensor, ...]

    @staticmethod
    def mark(made: Tensor, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """The tensor, marked as make(*tensors)."""
        made.loralab_remade = Remade(Again(make), tensors)  # type: ignore[attr-defined]
        return made

    @staticmethod
    def of(x: Tensor) -> Remade | None:
        """The mark of a tensor, if it has one."""
        return getattr(x, "loralab_remade", None)


@contextmanager
def in_autocast_type(x: Tensor) -> Iterator[Tensor]:
    """x in the type that autocast would give a matrix product, with autocast off inside.

    The operations here choose every type themselves; autocast would choose again.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        yield x
        return
    cast = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        yield cast


def drop(x: Tensor, probability: float) -> tuple[Tensor, Tensor | None]:
    """x after dropout, and the mask (bool) that backward needs; draws as nn.Dropout does."""
    if not probability:
        return x, None
    dropped, mask = torch.native_dropout(x, probability, True)
    return dropped, mask


def redrop(x: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """x after the dropout of a mask drawn earlier."""
    return x if mask is None else x * mask * (1 / (1 - probability))


def keep_input(
    ctx: Any, x: Tensor, remade: Remade | None
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """What backward needs of x (`ctx.needs_input_grad[3]`: A's): itself, or what makes it again."""
    ctx.again = None
    if not ctx.needs_input_grad[3]:
        return None, ()
    if remade is None:
        return x, ()
    ctx.again = remade.again
    ctx.again.promise()
    return None, remade.tensors


def factor_gradients(
    ctx: Any, saved: Sequence[Any], again: Sequence[Tensor], gy: Tensor, gz: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A and B from those of y and of z, the adapter's output (tokens, out).

    ctx: a context whose inputs begin as those of `LoraLinear.forward`, with its attributes.
    saved, again: its saved tensors; `again` to make x of, where x is None. They are passed because
    checkpointing allows one reading of them.
    Each gradient is in its own type, None where nothing needs it.
    """
    x, mask, weight, a, b, h = saved
    needs_x, _, _, needs_a, needs_b = ctx.needs_input_grad[:5]
    dtype = gy.dtype
    gx = ga = gb = None
    if needs_b:
        # h^T gz and not gz^T h: the wide matrix stays in its own order.
        gb = (h.t() @ gz).t().to(b.dtype)
    if needs_x or needs_a:
        gh = (gz @ b.to(dtype)).mul_(ctx.scaling)
        if needs_a:
            if x is None:
                x = ctx.again(*again).view(-1, a.shape[1])
            ga = (gh.t() @ redrop(x, mask, ctx.dropout)).to(a.dtype)
        if needs_x:
            # gy W + D gh A: the adapter's part first, so that the sum is rounded once.
            gx = redrop(gh @ a.to(dtype), mask, ctx.dropout).addmm_(gy, weight.to(dtype))
    return gx, ga, gb


class LoraLinear(torch.autograd.Function):
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
        remade: Remade | None = None,
    ) -> Tensor:
        """y (tokens, out) in x's type; the other tensors are cast to it."""
        dtype = x.dtype
        dropped, mask = drop(x, dropout)
        h = (dropped @ a.to(dtype).t()).mul_(scaling)
        ctx.scaling, ctx.dropout = scaling, dropout
        kept, again = keep_input(ctx, x, remade)
        ctx.save_for_backward(kept, mask, weight, a, b, h, *again)
        across = b.to(dtype).t()
        y = h @ across if bias is None else torch.addmm(bias.to(dtype), h, across)
        return y.addmm_(x, weight.to(dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B, each in its own type."""
        saved = ctx.saved_tensors
        gx, ga, gb = factor_gradients(ctx, saved[:6], saved[6:], gy, gy)
        return gx, None, None, ga, gb, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """y = x W^T + b + s dropout(x) A^T B^T.

    x (..., in); weight (out, in) and bias (out,), both frozen; a (r, in); b (out, r);
    dropout: probability in [0, 1), 0 outside training. Returns (..., out) in x's type, or in
    autocast's where that is on; a and b may be fp32 beside a bf16 x.
    """
    with in_autocast_type(x) as cast:
        y: Tensor = LoraLinear.apply(  # type: ignore[no-untyped-call]
            cast.reshape(-1, x.shape[-1]),
            weight,
            bias,
            a,
            b,
            scaling,
            dropout,
            Remade.of(x) if cast is x else None,
        )
    return y.view(*x.shape[:-1], weight.shape[0])
