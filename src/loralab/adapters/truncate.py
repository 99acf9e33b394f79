"""A dense change of the weights as the nearest LoRA adapter, and how much that loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from loralab.adapters.state import AdapterState, Factors


@dataclass(frozen=True)
class Truncation:
    """The adapter, and relative errors ||change - scaling * B A||_F / ||change||_F.

    modules: by module, 0 where the change is zero. total: over all modules together.
    """

    adapter: AdapterState
    modules: Mapping[str, float]
    total: float


def truncate(
    change: Mapping[str, Tensor], rank: int, scaling: float, base: str | None = None
) -> Truncation:
    """The best rank-`rank` adapter for a change of W (out, in) by module (Eckart-Young).

    The singular vectors come from the Gram matrix of the smaller side in float64, which is many
    times faster than an SVD and as good for those that are kept: squaring costs precision only
    in singular values 1e-8 below the largest. A module narrower than the rank is padded with zeros.

    Raises:
        ValueError: the change is not finite.
    """
    factors, errors = {}, {}
    lost = whole = 0.0
    for name, delta in change.items():
        if not bool(torch.isfinite(delta).all()):
            raise ValueError(f"{name}: the change holds NaN or infinity; nothing to truncate")
        dense = delta.detach().double()
        a, b = _nearest(dense, rank)
        even = sqrt(scaling)
        factors[name] = Factors((a / even).float().contiguous(), (b / even).float().contiguous())
        error = (dense - scaling * factors[name].B.double() @ factors[name].A.double()).norm()
        size = dense.norm()
        errors[name] = float(error / size) if size > 0 else 0.0
        lost, whole = lost + float(error) ** 2, whole + float(size) ** 2
    total = sqrt(lost / whole) if whole > 0 else 0.0
    return Truncation(AdapterState(factors, scaling, base=base), errors, total)


def _nearest(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with B A the projection of `dense` on its top directions."""
    wide = dense.shape[0] <= dense.shape[1]
    gram = dense @ dense.T if wide else dense.T @ dense
    values, vectors = torch.linalg.eigh(gram)
    kept = min(rank, vectors.shape[1])
    top = vectors[:, -kept:].flip(-1)
    # A square root of the singular values goes to each factor, so that neither is extreme.
    share = values[-kept:].flip(-1).clamp_min(0).pow(0.25)
    inverse = torch.where(share > 0, 1 / share, 0.0)
    b = top * share if wide else (dense @ top) * inverse
    a = inverse[:, None] * (top.T @ dense) if wide else share[:, None] * top.T
    if kept < rank:
        a = torch.cat([a, a.new_zeros(rank - kept, a.shape[1])], 0)
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - kept)], 1)
    return a, b
