"""The two factors of one module's update."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Factors(NamedTuple):
    """The two factors of one module's update, dW = scaling * B @ A (out, in)."""

    A: Tensor
    """(r, in)"""
    B: Tensor
    """(out, r)"""
