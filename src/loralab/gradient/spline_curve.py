"""LS-LoRA's learned function and its gradients in closed form, in PyTorch.

    out = (1 - g) z + g o phi(i z)          (g = 1 where there is no gate)

phi is piecewise linear, phi(u) = level_p + slope_p u on piece p. All gradients follow from two
sums over each piece, G_p = sum gy and M_p = sum gy z, so backward needs one pass over (z, gy)
and keeps nothing of their size:

    dz  = gy ((1 - g) + g o i slope_p)
    do  = g sum_p (level_p G_p + slope_p i M_p) = g S
    di  = g o sum_p slope_p M_p
    dg  = o S - sum_p M_p
    right_p = (i M_p - k_p G_p) / (k_{p+1} - k_p);   dv_p += g o (G_p - right_p),
                                                     dv_{p+1} += g o right_p

`native/spline.cpp` is the same on a CPU with a compiler; this runs everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loralab.adapters.knots import shared_knots


class Curve(NamedTuple):
    """A spline's parameters, detached, in fp32 or fp64.

    deviation: (knots,), of the values from the identity, v - k. input_scale, output_scale, and
    gate where there is one: one element each. clamp: constant outside [k_min, k_max], not straight.
    """

    deviation: Tensor
    input_scale: Tensor
    output_scale: Tensor
    gate: Tensor | None
    k_min: float
    k_max: float
    clamp: bool


class Parameters(NamedTuple):
    """A spline's parameters as the optimiser has them, in any type.

    values: (knots,). input_scale, output_scale, and gate where there is one: one element each.
    """

    values: Tensor
    input_scale: Tensor
    output_scale: Tensor
    gate: Tensor | None
    k_min: float
    k_max: float
    clamp: bool

    @property
    def grid(self) -> Tensor:
        """The values of the identity."""
        v = self.values
        return shared_knots(v.shape[0], self.k_min, self.k_max, v.device, v.dtype)

    @property
    def pieces(self) -> int:
        """Segments between knots, and the two level ends if clamped."""
        return self.values.shape[0] - 1 + 2 * self.clamp

    def curve(self) -> Curve:
        """In the precision that PyTorch computes with."""
        work = torch.promote_types(self.values.dtype, torch.float32)
        return Curve(
            # Of the knots as this type can hold them: v = k must deviate by exactly 0.
            self.values.to(work) - self.grid.to(work),
            self.input_scale.to(work),
            self.output_scale.to(work),
            None if self.gate is None else self.gate.to(work),
            self.k_min,
            self.k_max,
            self.clamp,
        )


class _Lines(NamedTuple):
    """phi by pieces: level + slope u, piece p above thresholds[p - 1]."""

    knots: Tensor
    level: Tensor
    slope: Tensor
    thresholds: Tensor


def _lines(curve: Curve) -> _Lines:
    d = curve.deviation
    index = torch.arange(d.shape[0], dtype=d.dtype, device=d.device)
    knots = curve.k_min + index * ((curve.k_max - curve.k_min) / (d.shape[0] - 1))
    lean = d.diff() / knots.diff()
    level, slope = d[:-1] - lean * knots[:-1], 1 + lean
    if not curve.clamp:
        return _Lines(knots, level, slope, knots[1:-1])
    ends, flat = (knots + d)[[0, -1]], slope.new_zeros(1)
    level = torch.cat([ends[:1], level, ends[1:]])
    return _Lines(knots, level, torch.cat([flat, slope, flat]), knots)


def _gate(curve: Curve) -> Tensor | float:
    return 1.0 if curve.gate is None else curve.gate


def _above(z: Tensor, curve: Curve, lines: _Lines) -> list[Tensor]:
    u = z * curve.input_scale
    return [u > threshold for threshold in lines.thresholds.to(u.dtype)]


def forward(z: Tensor, curve: Curve) -> Tensor:
    """(1 - g) z + g o phi(i z), in z's shape and type; computed in fp32 at least."""
    x, lines, g = z.to(torch.promote_types(z.dtype, torch.float32)), _lines(curve), _gate(curve)
    offset = (g * curve.output_scale * lines.level).to(x.dtype)
    slope = (1 - g + g * curve.output_scale * curve.input_scale * lines.slope).to(x.dtype)
    offsets, slopes = offset[0], slope[0]
    for p, above in enumerate(_above(x, curve, lines), start=1):
        offsets = torch.where(above, offset[p], offsets)
        slopes = torch.where(above, slope[p], slopes)
    return (offsets + slopes * x).to(z.dtype)


def backward(z: Tensor, gy: Tensor, curve: Curve) -> tuple[Tensor, Tensor]:
    """Gradients of z, in its shape and type, and of the parameters.

    The second is (knots + 3,): of the values, input_scale, output_scale and gate.
    """
    work = torch.promote_types(z.dtype, torch.float32)
    x, gradient, lines, g = z.to(work), gy.to(work), _lines(curve), _gate(curve)
    o, i = curve.output_scale, curve.input_scale
    slope = (1 - g + g * o * i * lines.slope).to(work)
    above = _above(x, curve, lines)
    slopes = slope[0]
    for p, beyond in enumerate(above, start=1):
        slopes = torch.where(beyond, slope[p], slopes)
    # Each piece summed by itself: differences of sums above a threshold would cancel in fp32.
    weighted, everywhere = gradient * x, torch.ones_like(x, dtype=torch.bool)
    lower, upper = [everywhere, *above], [*above, ~everywhere]
    inside = [low & ~high for low, high in zip(lower, upper, strict=True)]
    by_g = torch.stack([torch.where(part, gradient, 0.0).sum() for part in inside])
    by_gz = torch.stack([torch.where(part, weighted, 0.0).sum() for part in inside])

    with_phi = (lines.level * by_g + lines.slope * i * by_gz).sum()
    inner = slice(1, -1) if curve.clamp else slice(None)
    left, width = lines.knots[:-1], lines.knots.diff()
    right = (i * by_gz[inner] - left * by_g[inner]) / width
    nothing = right.new_zeros(1)
    values = torch.cat([by_g[inner] - right, nothing]) + torch.cat([nothing, right])
    if curve.clamp:
        values[0] += by_g[0]
        values[-1] += by_g[-1]
    rest = [g * o * (lines.slope * by_gz).sum(), g * with_phi, o * with_phi - by_gz.sum()]
    gradients = torch.cat([g * o * values, *(one.reshape(1) for one in rest)])
    return (slopes * gradient).to(z.dtype), gradients.to(work)
