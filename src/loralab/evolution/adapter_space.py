"""Search over the factors of a LoRA adapter: B alone, or A and B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from loralab.adapters.extract import minus
from loralab.adapters.scale import Statistic, sigma_a, sigma_b
from loralab.adapters.state import AdapterState, Factors
from loralab.evolution.layout import Floats, Layout
from loralab.evolution.noise import draw, in_threads, pair_and_sign, pairs
from loralab.evolution.space import NOISE_KEPT, Centre, Perturbed, spread


@dataclass(frozen=True)
class AdapterSpace:
    """Tensors "<module>.B", and "<module>.A" too if `on_a`, of the start adapter (fp32).

    sigmas: as `adapter_sigmas` gives them, for every tensor searched.
    dtype: the model's; members are cast to it from the fp32 master plus noise.
    taken: what the start took out of W (see `Start`): the engine runs W minus it, and the adapter
        that is saved has it taken off, so that it belongs to the base as it is.
    """

    start_adapter: AdapterState
    sigmas: Mapping[str, float]
    dtype: torch.dtype
    on_a: bool = False
    taken: AdapterState | None = None

    @cached_property
    def layout(self) -> Layout:
        parts = "AB" if self.on_a else "B"
        return Layout(
            {
                f"{name}.{part}": tuple(getattr(factors, part).shape)
                for name, factors in self.start_adapter.factors.items()
                for part in parts
            }
        )

    def start(self) -> Floats:
        flat = np.empty(self.layout.size, dtype=np.float32)
        for name, into in self.layout.parts(flat):
            module, _, part = name.rpartition(".")
            into[:] = getattr(self.start_adapter.factors[module], part).float().numpy().reshape(-1)
        return flat

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
        count, size = pairs(population, antithetic), self.layout.size
        wanted = range(count) if only is None else only
        signs = 2 if antithetic else 1
        keep = len(wanted) * size <= NOISE_KEPT
        centre = _cast(master, self.dtype)
        sigmas = {name: sigma * sigma_factor for name, sigma in self.sigmas.items()}
        # Two blocks, given back whole: thousands of small pieces would be left as fragments.
        noise = np.empty((len(wanted), size), dtype=np.float32) if keep else None
        casts = torch.empty((signs * len(wanted), size), dtype=self.dtype)

        def fill_pair(place: int) -> int:
            out = None if noise is None else noise[place]
            eps = draw(self.layout, seed, generation, wanted[place], out)
            offset, same = self.layout.scaled(eps, sigmas), 0
            for cast in range(signs * place, signs * (place + 1)):
                _, sign = pair_and_sign(cast, antithetic)
                moved = master + np.float32(sign) * offset
                casts[cast].copy_(torch.from_numpy(moved))
                same += int(torch.count_nonzero(casts[cast] == centre))
            return same

        same = sum(in_threads(fill_pair, range(len(wanted)), threads))
        return Perturbed(
            centre=Centre(self._state(centre, self._cast_a), self._change),
            members=tuple(self._state(cast, self._cast_a) for cast in casts),
            noise=None if noise is None else spread(noise, wanted, count),
            unchanged_share=same / casts.numel(),
        )

    def ascent(
        self,
        seed: int,
        generation: int,
        weights: Sequence[float],
        noise: tuple[Floats, ...] | None,
    ) -> Floats:
        total = np.zeros(self.layout.size, dtype=np.float32)
        term = np.empty_like(total)
        for pair, weight in enumerate(weights):
            if weight != 0:
                kept = None if noise is None else noise[pair]
                if kept is None or not kept.size:
                    kept = draw(self.layout, seed, generation, pair)
                np.multiply(kept, np.float32(weight), out=term)
                total += term
        return total

    def centre(self, master: Floats) -> Centre:
        return Centre(self._state(_cast(master, self.dtype), self._cast_a), self._change)

    def adapter(self, master: Floats) -> AdapterState:
        """The point as an fp32 adapter of the true base: what is saved and digested."""
        fixed = {name: factors.A for name, factors in self.start_adapter.factors.items()}
        point = self._state(torch.from_numpy(master), fixed)
        return point if self.taken is None else minus(point, self.taken)

    def digest(self, master: Floats) -> str:
        return self.adapter(master).digest()

    @cached_property
    def _change(self) -> dict[str, Tensor] | None:
        """One object for every generation, which an engine need not apply again."""
        if self.taken is None:
            return None
        scaling = self.taken.scaling
        return {name: -scaling * (b @ a) for name, (a, b) in self.taken.factors.items()}

    @cached_property
    def _cast_a(self) -> dict[str, Tensor]:
        """One tensor object for each A, which every member shares unless A is searched."""
        return {
            name: factors.A.to(self.dtype) for name, factors in self.start_adapter.factors.items()
        }

    def _state(self, flat: Tensor, fixed_a: Mapping[str, Tensor]) -> AdapterState:
        tensors = self.layout.tensors(flat)
        start = self.start_adapter
        return AdapterState(
            {
                name: Factors(
                    tensors[f"{name}.A"] if self.on_a else fixed_a[name], tensors[f"{name}.B"]
                )
                for name in start.factors
            },
            start.scaling,
            start.kind,
            start.base,
            start.extra,
        )


def adapter_sigmas(
    start: AdapterState,
    perturbation: Mapping[str, float],
    on_a: bool,
    statistic: Statistic,
    fraction: float,
) -> dict[str, float]:
    """Noise of each tensor searched, by tensor name.

    perturbation: RMS wanted of the change of W by module, which sets the noise on B. Noise on A is
        the same fraction of A's own magnitude.
    """
    sigmas = {}
    for name, factors in start.factors.items():
        if on_a:
            sigmas[f"{name}.A"] = sigma_a(factors.A, statistic, fraction)
        sigmas[f"{name}.B"] = sigma_b(perturbation[name], factors.A, start.scaling)
    return sigmas


def _cast(flat: Floats, dtype: torch.dtype) -> Tensor:
    """A copy in the model's dtype, rounded to nearest, ties to even."""
    return torch.from_numpy(flat).to(dtype, copy=True)
