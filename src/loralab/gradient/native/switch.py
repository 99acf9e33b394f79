"""Native kernels can be put aside, to measure what they give and to test what runs without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_aside = 0


def wanted() -> bool:
    """Whether native kernels may run."""
    return not _aside


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Within it the training step runs in PyTorch alone, in every thread."""
    global _aside
    _aside += 1
    try:
        yield
    finally:
        _aside -= 1
