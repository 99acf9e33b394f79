"""Soft interpolation: the values of a spline averaged with a softmax over its knots."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp
from typing import Any

import torch
from torch import Tensor

_CHUNK = 2**16
"""Numbers worked on at a time: the temporaries of one chunk stay in a core's own cache."""
_TAIL = 8.0
"""Steps beyond an end knot past which its weight is 1 in fp32 (the next has e^-17)."""
MOST_KNOTS = 7
"""With more, weights relative to the middle knot's would leave fp32's range."""


def soft_spline(z: Tensor, values: Tensor, k_min: float, k_max: float) -> Tensor:
    """The values averaged with weights softmax_j(-((z - k_j) / step)^2), elementwise.

    Smooth, but NOT the identity at v = k: it flattens towards the ends of the grid (at an end knot
    it is off by 0.3 of a step) and is constant beyond. An adapter that starts so is not plain LoRA.
    Computed in fp32 at least; up to 7 knots nothing but z is kept for the backward pass.

    z: any shape. values: (num_knots,), at least two.
    """
    if values.shape[0] > MOST_KNOTS:
        return _plain(z, values, k_min, k_max)
    made: Tensor = _Soft.apply(z, values, k_min, k_max)  # type: ignore[no-untyped-call]
    return made


def _plain(z: Tensor, values: Tensor, k_min: float, k_max: float) -> Tensor:
    work = torch.promote_types(z.dtype, torch.float32)
    count = values.shape[0]
    places = torch.arange(count, device=z.device, dtype=work)
    distance = (z.to(work) - k_min).unsqueeze(-1) * ((count - 1) / (k_max - k_min)) - places
    weights = torch.softmax(-distance.square(), dim=-1)
    return (weights * values.to(work)).sum(-1).to(z.dtype)


class _Soft(torch.autograd.Function):
    """With u = (z - centre) / step and j counted from the middle knot, a weight is

        w_j = exp(2 u j - j^2) = w_{j-1} * exp(2 u) * exp(1 - 2 j),

    the factor exp(-u^2) that all share left out: two exponentials a number, whatever the knots.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor, k_min: float, k_max: float) -> Tensor:
        ctx.save_for_backward(z, values)
        ctx.grid = (k_min, k_max)
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
        flat, into = z.reshape(-1), out.view(-1)
        v = values.tolist()
        for at in _chunks(flat):
            total, above = None, None
            for j, w in _weights(flat[at], len(v), k_min, k_max):
                total = w.clone() if total is None else total.add_(w)
                above = w * v[j] if above is None else above.add_(w, alpha=v[j])
            assert above is not None
            into[at] = above.div_(total)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        z, values = ctx.saved_tensors
        k_min, k_max = ctx.grid
        v = values.tolist()
        middle = (len(v) - 1) / 2
        per_step = 2 * (len(v) - 1) / (k_max - k_min)
        flat, flat_g = z.reshape(-1), g.reshape(-1)
        gz = torch.empty_like(flat)
        work = torch.promote_types(z.dtype, torch.float32)
        gv = torch.zeros(len(v), dtype=torch.float64, device=z.device)
        for at in _chunks(flat):
            weights = [w.clone() for _, w in _weights(flat[at], len(v), k_min, k_max)]
            share = torch.stack(weights)
            share /= share.sum(0)
            here = flat_g[at].to(work)
            gv += (share @ here).double()
            # d phi / d u = 2 (E[v j] - E[v] E[j]), twice a covariance under the weights.
            places = torch.arange(len(v), dtype=work, device=z.device) - middle
            v_here = values.to(work)
            slope = (v_here * places) @ share
            slope -= (v_here @ share) * (places @ share)
            gz[at] = slope.mul_(here).mul_(per_step)
        return gz.view_as(z), gv.to(values.dtype), None, None


def _weights(z: Tensor, count: int, k_min: float, k_max: float) -> Iterator[tuple[int, Tensor]]:
    """(knot, weights of all z) from the first knot to the last; one tensor, changed in place."""
    work = torch.promote_types(z.dtype, torch.float32)
    middle = (count - 1) / 2
    u = (z.to(work) - (k_min + k_max) / 2) * ((count - 1) / (k_max - k_min))
    u = u.clamp_(-middle - _TAIL, middle + _TAIL)
    step = (2 * u).exp_()
    w = u.mul_(-2 * middle).sub_(middle * middle).exp_()
    for knot in range(count):
        if knot:
            w.mul_(step).mul_(exp(1 - 2 * (knot - middle)))
        yield knot, w


def _chunks(flat: Tensor) -> Iterator[slice]:
    return (slice(at, at + _CHUNK) for at in range(0, flat.numel(), _CHUNK))
