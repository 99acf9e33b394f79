"""Random tensors, how far two are apart, and both ways the fused layers run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from loralab.gradient.native.switch import plain_pytorch


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.double().norm())


@pytest.fixture(params=["native", "plain"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with plain_pytorch() if request.param == "plain" else nullcontext():
        yield request.param
