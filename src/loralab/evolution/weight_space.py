"""Search over the base weights themselves, by low-rank noise (EGGROLL, arXiv 2511.16652).

A member adds sigma * E F^T / sqrt(k) to each module's W (out, in), with E (out, k) and F (in, k)
standard normal: every entry of that change has standard deviation sigma, but it runs as a LoRA
adapter of rank k. The update is a weighted sum of such changes over members and generations, of
growing rank, and is kept as one dense fp32 change a module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from loralab.adapters.state import AdapterState, Factors
from loralab.evolution.layout import Floats, Layout
from loralab.evolution.noise import draw, in_threads, pair_and_sign, pairs
from loralab.evolution.space import NOISE_KEPT, Centre, Perturbed, spread

ROWS_COMPARED = 4
"""Rows of each W on which `unchanged_share` is measured; all of them would cost a pass over W."""


@dataclass(frozen=True)
class WeightSpace:
    """Dense changes of the modules' weights, all zero at the start.

    shapes: (out, in) of each module's weight.
    sigmas: standard deviation of a member's change of W by module.
    weights: the base weights, needed only to tell how much of a perturbation their dtype absorbs.
    """

    shapes: Mapping[str, tuple[int, int]]
    sigmas: Mapping[str, float]
    dtype: torch.dtype
    noise_rank: int = 1
    base: str | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.shapes)

    @cached_property
    def factors(self) -> Layout:
        """Of one pair's noise: "<module>.E" (out, k) and "<module>.F" (k, in), F transposed."""
        k = self.noise_rank
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (d_out, d_in) in self.shapes.items():
            shapes |= {f"{name}.E": (d_out, k), f"{name}.F": (k, d_in)}
        return Layout(shapes)

    def start(self) -> Floats:
        return np.zeros(self.layout.size, dtype=np.float32)

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
        count = pairs(population, antithetic)
        wanted = range(count) if only is None else only
        noise = in_threads(lambda pair: draw(self.factors, seed, generation, pair), wanted, threads)
        members = []
        f_of_pair: dict[int, dict[str, Tensor]] = {}
        for member in range((2 if antithetic else 1) * len(wanted)):
            pair, sign = pair_and_sign(member, antithetic)
            tensors = self.factors.tensors(torch.from_numpy(noise[pair]))
            # Both members of a pair hold the same F, as one object.
            shared = f_of_pair.setdefault(
                pair, {name: tensors[f"{name}.F"].to(self.dtype) for name in self.shapes}
            )
            factors = {}
            for name in self.shapes:
                size = sign * sigma_factor * self.sigmas[name] / sqrt(self.noise_rank)
                factors[name] = Factors(shared[name], (tensors[f"{name}.E"] * size).to(self.dtype))
            members.append(AdapterState(factors, scaling=1.0, base=self.base))
        return Perturbed(
            centre=self.centre(master),
            members=tuple(members),
            noise=spread(noise, wanted, count)
            if len(wanted) * self.factors.size <= NOISE_KEPT
            else None,
            unchanged_share=self._unchanged_share(master, members[0]),
        )

    def ascent(
        self,
        seed: int,
        generation: int,
        weights: Sequence[float],
        noise: tuple[Floats, ...] | None,
    ) -> Floats:
        shares = [weight / sqrt(self.noise_rank) for weight in weights]
        drawn = []
        for pair in range(len(weights)):
            kept = None if noise is None else noise[pair]
            if kept is None or not kept.size:
                kept = draw(self.factors, seed, generation, pair)
            drawn.append(self.factors.tensors(torch.from_numpy(kept)))
        total = np.empty(self.layout.size, dtype=np.float32)
        for name, into in self.layout.tensors(torch.from_numpy(total)).items():
            e = torch.cat(
                [eps[f"{name}.E"] * weight for eps, weight in zip(drawn, shares, strict=True)], 1
            )
            f = torch.cat([eps[f"{name}.F"] for eps in drawn], 0)
            torch.mm(e, f, out=into)
        return total

    def centre(self, master: Floats) -> Centre:
        return Centre(adapter=None, change=self.change(master))

    def change(self, master: Floats) -> dict[str, Tensor]:
        """fp32 change of W (out, in) by module."""
        return self.layout.tensors(torch.from_numpy(master))

    def digest(self, master: Floats) -> str:
        digest = blake2b(digest_size=16)
        for name, part in self.layout.parts(master):
            digest.update(f"{name}|{self.shapes[name]}".encode())
            digest.update(part.data)
        return digest.hexdigest()

    def _unchanged_share(self, master: Floats, member: AdapterState) -> float | None:
        """Share of W's entries that would stay if the member were merged in the model's dtype."""
        same = total = 0
        change = self.change(master)
        for name, weight in self.weights.items():
            rows = weight[:ROWS_COMPARED].float().cpu() + change[name][:ROWS_COMPARED]
            a, b = member.factors[name]
            moved = rows + b[:ROWS_COMPARED].float() @ a.float()
            same += int(torch.count_nonzero(moved.to(self.dtype) == rows.to(self.dtype)))
            total += rows.numel()
        return same / total if total else None
