"""Factors of an adapter that is there already, at the rank and scaling of a new one."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from loralab.adapters.factors import Factors, padded
from loralab.adapters.inits.blind import kaiming


def resized(
    old: Factors, old_scaling: float, rank: int, scaling: float, generator: Generator
) -> tuple[Factors, float]:
    """scaling * B A nearest to old_scaling * B_old A_old at `rank`, and the energy it keeps.

    The same rank keeps the factors themselves, so nothing is lost. A higher one adds rows of A
    drawn as PEFT does and zero columns of B, which changes nothing and gives them a start. A lower
    one is the truncated SVD of the product, through QR of the factors (never out x in), with its
    size split evenly.
    """
    a, b = old.A.float(), old.B.float()
    ratio = old_scaling / scaling
    if rank == a.shape[0]:
        return Factors(a, b * ratio), 1.0
    if rank > a.shape[0]:
        grown = padded(Factors(a, b * ratio), rank)
        grown.A[a.shape[0] :] = kaiming(rank - a.shape[0], a.shape[1], generator)
        return grown, 1.0
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T)
    share = (s[:rank] * abs(ratio)).sqrt()
    sign = 1 if ratio > 0 else -1
    kept = filled(
        share[:, None] * (vt[:rank] @ q_a.T), q_b @ u[:, :rank] * (share * sign), rank, generator
    )
    size = float(s.norm())
    return kept, 1.0 if size == 0 else (float(s[:rank].norm()) / size) ** 2


def filled(a: Tensor, b: Tensor, rank: int, generator: Generator) -> Factors:
    """A (rank, in) and B (out, rank) of the same product, where every direction can learn.

    Directions that the fit left out (a change of lower rank, a module narrower than the rank) get
    a random row of A and a zero column of B: with both zero neither would ever get a gradient.
    """
    a, b = padded(Factors(a, b), rank)
    empty = ~(a.any(1) & b.any(0))
    fresh = kaiming(rank, a.shape[1], generator).to(a)
    return Factors(torch.where(empty[:, None], fresh, a), torch.where(empty, 0.0, b))
