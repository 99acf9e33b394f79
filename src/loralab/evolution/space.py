"""What is searched: a flat fp32 vector, the noise on it, and the adapters it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from loralab.adapters.state import AdapterState
from loralab.evolution.layout import Floats, Layout

NOISE_KEPT = 2**26
"""Numbers of noise (256 MiB) that a population may keep so that `tell` need not draw it again."""


@dataclass(frozen=True)
class Centre:
    """The unperturbed point, ready for an engine.

    adapter: in the model's dtype, None for the base model.
    change: fp32 change of the base weights (out, in) by module, None where they stay.
    """

    adapter: AdapterState | None
    change: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Perturbed:
    """Members around a centre.

    members: of every pair, or of those that `perturb` was asked for.
    noise: what was drawn, one entry a pair, empty where that pair's was not kept; None if nothing
        was.
    unchanged_share: share of entries that the cast to the model's dtype leaves as they are at the
        centre, so that the perturbation of them does nothing.
    """

    centre: Centre
    members: tuple[AdapterState, ...]
    noise: tuple[Floats, ...] | None
    unchanged_share: float | None


class Space(Protocol):
    """A search space. Implementations are frozen and hold no state of the search."""

    @property
    def layout(self) -> Layout:
        """Tensors of the flat vector."""
        ...

    @property
    def sigmas(self) -> Mapping[str, float]:
        """Standard deviation of the noise on each tensor, before schedules."""
        ...

    def start(self) -> Floats:
        """The vector that the search starts from, toward which weight decay pulls."""
        ...

    def perturb(
        self,
        master: Floats,
        seed: int,
        generation: int,
        population: int,
        antithetic: bool,
        sigma_factor: float,
        threads: int,
        only: Sequence[int] | None = None,
    ) -> Perturbed:
        """Members at master + sign * sigma * sigma_factor * noise.

        only: pairs (draws, if not antithetic) whose members are wanted, ascending; None is all of
            them. A member is the same to the last bit whichever others are made with it.
        """
        ...

    def ascent(
        self,
        seed: int,
        generation: int,
        weights: Sequence[float],
        noise: tuple[Floats, ...] | None,
    ) -> Floats:
        """sum_pair weights[pair] * noise[pair], in units of sigma; what `noise` lacks is drawn."""
        ...

    def centre(self, master: Floats) -> Centre:
        """The point itself, for an engine."""
        ...

    def digest(self, master: Floats) -> str:
        """Hex digest of the exact fp32 point."""
        ...


def spread(noise: Iterable[Floats], drawn: Sequence[int], pairs: int) -> tuple[Floats, ...]:
    """One entry a pair: the noise of those drawn, and nothing for the others."""
    nothing = np.empty(0, dtype=np.float32)
    of_pair = dict(zip(drawn, noise, strict=True))
    return tuple(of_pair.get(pair, nothing) for pair in range(pairs))
