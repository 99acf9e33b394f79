"""Named tensors laid end to end in one flat vector: arithmetic on all of them is one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt
from torch import Tensor

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors, in the order in which they lie."""

    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return tuple(prod(shape) for shape in self.shapes.values())

    @cached_property
    def size(self) -> int:
        """Number of entries in all."""
        return sum(self.sizes)

    def parts(self, flat: Floats) -> Iterator[tuple[str, Floats]]:
        """Each tensor's name and its slice of the flat vector (1-D views)."""
        at = 0
        for name, size in zip(self.shapes, self.sizes, strict=True):
            yield name, flat[at : at + size]
            at += size

    def tensors(self, flat: Tensor) -> dict[str, Tensor]:
        """Each tensor by name, in its shape (views of the flat vector)."""
        pieces = flat.split_with_sizes(self.sizes)
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def scaled(
        self, flat: Floats, factors: Mapping[str, float], out: Floats | None = None
    ) -> Floats:
        """Each tensor multiplied by its own factor, in a new vector or in `out`."""
        out = np.empty(self.size, dtype=np.float32) if out is None else out
        for (name, part), (_, into) in zip(self.parts(flat), self.parts(out), strict=True):
            np.multiply(part, np.float32(factors[name]), out=into)
        return out
