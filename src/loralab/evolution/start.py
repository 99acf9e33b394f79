"""The adapter a search starts from, drawn again from its seed alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np
import torch

from loralab.adapters.state import AdapterState, Factors
from loralab.evolution.noise import fill

BEFORE_ALL = -1
"""The generation whose noise is the start adapter's A, before any that perturbs it."""


def start_adapter(
    shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float, seed: int, base: str | None
) -> AdapterState:
    """A (rank, in) ~ N(0, 1 / in), B (out, rank) = 0, in fp32: the base model's own behaviour.

    shapes: (out, in) of each module's weight.
    """
    factors = {}
    for name, (d_out, d_in) in shapes.items():
        a = np.empty((rank, d_in), dtype=np.float32)
        fill(a, seed, BEFORE_ALL, 0, f"{name}.A")
        a *= np.float32(1.0 / sqrt(d_in))
        factors[name] = Factors(torch.from_numpy(a), torch.zeros(d_out, rank))
    return AdapterState(factors, alpha / rank, base=base)
