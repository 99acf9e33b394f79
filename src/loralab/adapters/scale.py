"""How large a model's weights are, and how large noise on an adapter has to be to match them.

The size of a perturbation is set by what it does to W: its root mean square is a fraction of the
magnitude of W. By default each module has its own magnitude; taking one for a whole layer lets
a single module that is out of proportion set the noise of every other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import median
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loralab.errors import UserError

Granularity = Literal["module", "layer"]
Statistic = Literal["mean", "median", "rms"]
OUTLIER_RATIO = 10.0


@dataclass(frozen=True)
class Magnitude:
    """Statistics of |W| over `count` entries, computed in float64."""

    mean: float
    median: float
    rms: float
    max: float
    count: int

    def of(self, statistic: Statistic) -> float:
        """One of them, by name."""
        return {"mean": self.mean, "median": self.median, "rms": self.rms}[statistic]


@dataclass(frozen=True)
class Outlier:
    """A module out of proportion.

    ratio: its mean |W| over the median of its peers, which are the modules of its `kind` (the
        same name in other layers) or of its own `layer`, whichever gives the larger ratio.
    """

    module: str
    magnitude: float
    among: Literal["kind", "layer"]
    peers: float
    ratio: float

    def __str__(self) -> str:
        where = "of its kind" if self.among == "kind" else "in its layer"
        return (
            f"{self.module}: mean |W| {self.magnitude:.3g} is {self.ratio:.0f} x the median "
            f"{self.peers:.3g} {where}"
        )


@dataclass(frozen=True)
class WeightReport:
    """Magnitudes by module and by layer (pooled over the entries of its modules)."""

    modules: Mapping[str, Magnitude]
    layers: Mapping[str, Magnitude]
    outliers: tuple[Outlier, ...]

    def perturbation(
        self, granularity: Granularity, statistic: Statistic, fraction: float
    ) -> dict[str, float]:
        """RMS wanted of the change of each module's W: fraction x magnitude.

        Raises:
            UserError: a magnitude is zero, so that the module would get no noise at all.
        """
        wanted = {}
        for name, own in self.modules.items():
            source = own if granularity == "module" else self.layers[layer_of(name)]
            if source.of(statistic) == 0:
                raise UserError(
                    f"{name}: the {statistic} of |W| by {granularity} is 0, so its noise would be "
                    "0; choose another evolution.scale.statistic or leave the module out"
                )
            wanted[name] = fraction * source.of(statistic)
        return wanted

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def layer_of(name: str) -> str:
    """The path up to its last number ("model.layers.3"), or all but the last part without one."""
    match = re.match(r"(.*\.\d+)\.", name)
    return match.group(1) if match else name.rpartition(".")[0]


def kind_of(name: str) -> str:
    """What plays the same part in every layer: the path below the layer ("mlp.up_proj")."""
    return name.removeprefix(layer_of(name)).lstrip(".")


def analyse(weights: Mapping[str, Tensor]) -> WeightReport:
    """Magnitudes of the weights (out, in) by module and layer, and which are out of proportion.

    Raises:
        UserError: a weight holds NaN or infinity.
    """
    tallies = {name: _tally(name, weight) for name, weight in weights.items()}
    modules = {name: _magnitude([tally]) for name, tally in tallies.items()}
    by_layer = _grouped(weights, layer_of)
    layers = {
        layer: modules[names[0]] if len(names) == 1 else _magnitude([tallies[n] for n in names])
        for layer, names in by_layer.items()
    }
    return WeightReport(modules, layers, tuple(_outliers(modules)))


def sigma_b(wanted: float, a: Tensor, scaling: float) -> float:
    """Standard deviation of noise on B that changes W by an RMS of `wanted`, A (r, in) fixed.

    dW = scaling * N @ A with N (out, r) of variance sigma^2 has a mean square of
    scaling^2 * sigma^2 * ||A||_F^2 / in.
    """
    norm = float(a.detach().double().norm())
    if norm == 0 or scaling == 0:
        raise ValueError(f"noise on B cannot change W: ||A|| is {norm}, scaling is {scaling}")
    return wanted * sqrt(a.shape[1]) / (abs(scaling) * norm)


def sigma_a(a: Tensor, statistic: Statistic, fraction: float) -> float:
    """Standard deviation of noise on A: the same fraction of A's own magnitude."""
    return fraction * _magnitude([_tally("A", a)]).of(statistic)


@dataclass(frozen=True)
class _Tally:
    """|W| either as a histogram over the 2^15 values of a 16-bit type, or as it is."""

    counts: npt.NDArray[np.int64] | None
    values: npt.NDArray[np.floating]


def _tally(name: str, weight: Tensor) -> _Tally:
    """16-bit weights are counted by bit pattern: exact, and much faster than sorting them."""
    flat = weight.detach().cpu().reshape(-1)
    if flat.numel() == 0:
        raise UserError(f"{name}: the weight is empty")
    if flat.dtype in (torch.bfloat16, torch.float16):
        bits = flat.view(torch.int16).numpy() & np.int16(0x7FFF)
        every = torch.arange(2**15, dtype=torch.int16).view(flat.dtype).to(torch.float64).numpy()
        counts = np.bincount(bits, minlength=2**15)
        sound = not counts[~np.isfinite(every)].any()
        tally = _Tally(counts, every)
    else:
        values = flat.abs().numpy()
        sound = bool(np.isfinite(values).all())
        tally = _Tally(None, values)
    if not sound:
        raise UserError(f"{name}: the weight holds NaN or infinity; the model is damaged")
    return tally


def _magnitude(tallies: Sequence[_Tally]) -> Magnitude:
    """Statistics of the entries of all tallies together."""
    if any(tally.counts is None for tally in tallies):
        return _magnitude_of_values(np.concatenate([_expanded(tally) for tally in tallies]))
    values = tallies[0].values
    counts = sum((t.counts for t in tallies if t.counts is not None), np.zeros(2**15, np.int64))
    seen = counts > 0
    values, counts = values[seen].astype(np.float64), counts[seen]
    total, upto = int(counts.sum()), np.cumsum(counts)
    low, high = np.searchsorted(upto, [(total - 1) // 2, total // 2], side="right")
    return Magnitude(
        mean=float(values @ counts) / total,
        median=float(values[low] + values[high]) / 2,
        rms=sqrt(float(values**2 @ counts) / total),
        max=float(values[-1]),
        count=total,
    )


def _magnitude_of_values(values: npt.NDArray[np.floating]) -> Magnitude:
    return Magnitude(
        mean=float(values.mean(dtype=np.float64)),
        median=float(np.median(values)),
        rms=sqrt(float(np.square(values, dtype=np.float64).mean())),
        max=float(values.max()),
        count=values.size,
    )


def _expanded(tally: _Tally) -> npt.NDArray[np.floating]:
    return tally.values if tally.counts is None else np.repeat(tally.values, tally.counts)


def _grouped(names: Iterable[str], by: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(by(name), []).append(name)
    return groups


def _outliers(modules: Mapping[str, Magnitude]) -> Iterable[Outlier]:
    kinds, layers = _grouped(modules, kind_of), _grouped(modules, layer_of)
    for name, own in modules.items():
        worst: Outlier | None = None
        for among, group in (("kind", kinds[kind_of(name)]), ("layer", layers[layer_of(name)])):
            if len(group) < 3:
                continue  # with two, neither is the odd one
            peers = median(modules[other].mean for other in group)
            ratio = own.mean / peers if peers > 0 else float("inf")
            if ratio > OUTLIER_RATIO and (worst is None or ratio > worst.ratio):
                label: Literal["kind", "layer"] = "kind" if among == "kind" else "layer"
                worst = Outlier(name, own.mean, label, peers, ratio)
        if worst is not None and worst.magnitude > 0:
            yield worst
