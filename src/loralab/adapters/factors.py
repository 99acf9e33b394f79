"""The two factors of one module's update, and the name PEFT gives the module."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PEFT_PREFIX = "base_model.model."
"""What PEFT has before a module's own name, in `named_modules()` and in its files."""


class Factors(NamedTuple):
    """The two factors of one module's update, dW = scaling * B @ A (out, in)."""

    A: Tensor
    """(r, in)"""
    B: Tensor
    """(out, r)"""


def padded(factors: Factors, rank: int) -> Factors:
    """The same product at a rank as high or higher: zero rows of A and zero columns of B more."""
    a, b = factors
    more = rank - a.shape[0]
    if more == 0:
        return factors
    a = torch.cat([a, a.new_zeros(more, a.shape[1])], 0)
    return Factors(a, torch.cat([b, b.new_zeros(b.shape[0], more)], 1))
