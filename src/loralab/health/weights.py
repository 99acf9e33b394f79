"""What an adapter does to the weights: how large, how spread, and whether it is numbers at all.

No product B A is formed: with B = Q_B R_B and A^T = Q_A R_A the singular values of s B A are those
of the small matrix s R_B R_A^T. Adapters of another type than LoRA are seen through their dense
change of one module at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import exp, isfinite
from statistics import fmean, median
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loralab.adapters.dense import dense_weight
from loralab.adapters.factors import PEFT_PREFIX
from loralab.adapters.spline_diagnostics import measure as measure_splines
from loralab.adapters.spline_diagnostics import spline_layers
from loralab.adapters.targets import weight_of
from loralab.adapters.true_base import memory_of

if TYPE_CHECKING:
    from loralab.health.look import Look

INTRUDER = 0.5
"""A leading singular vector of W + dW that is no nearer to any of W's than this is an intruder."""

_LEADING = 10
_LARGEST_SVD = 4096
_QUANTISED = {"Params4bit", "Int8Params"}
_ITERATIONS, _COLUMNS = 12, 4


@dataclass(frozen=True)
class ModuleWeights:
    """One adapted module; norms of dW are relative to those of W.

    effective_rank: exp of the entropy of the singular values' shares (Roy and Vetterli 2007).
    stable_rank: ||dW||_F^2 / ||dW||_2^2. base_share: <dW, W> / ||dW||_F^2, about 0 for what was
    learned and 1 where dW is a part of W itself; 0 of a dW so small that chance could give
    either. idle: dW = 0. dead: both factors are 0, from where
    no gradient leads away. intruders: None where it was not looked for. NaN where dW is.
    """

    delta_ratio: float
    spectral_ratio: float
    effective_rank: float
    stable_rank: float
    base_share: float
    idle: bool
    dead: bool
    intruders: int | None = None


class WeightProbe:
    """`weights.*` and `spline.*` of the adapter of a look; {} of a model without one.

    intruders: how many modules, those of the largest change, to look for intruder dimensions in
    (Shuttleworth et al. 2024, arXiv:2410.21228); each costs two eigendecompositions. Advice only:
    they come with some healthy trainings too.
    """

    name = "weights"
    measures = "||dW|| / ||W||, ranks, share of W, dead and NaN tensors, splines"
    cost = "a QR of both factors a module; the base's norms once"

    def __init__(self, adapter: str | None = None, intruders: int = 0) -> None:
        self.adapter = adapter
        self._intruders = intruders
        self._norms: WeakKeyDictionary[nn.Module, tuple[float, float]] = WeakKeyDictionary()

    def measure(self, look: Look) -> dict[str, float]:
        """Largest and mean over the modules, and counts."""
        return self.measure_model(look.subject.model)

    def measure_model(self, model: nn.Module) -> dict[str, float]:
        """As `measure`, of a PEFT model."""
        adapter = self.adapter or active_adapter(model)
        if adapter is None:
            return {}
        found = self.modules(model, adapter)
        values = {"weights.nan": float(len(not_finite(model, adapter)))}
        values |= _summary(found) | spline_values(model, adapter)
        return values

    @torch.no_grad()
    def modules(self, model: nn.Module, adapter: str | None = None) -> dict[str, ModuleWeights]:
        """Every adapted linear module by its name in the base model."""
        adapter = adapter or self.adapter or active_adapter(model)
        found: dict[str, ModuleWeights] = {}
        layers = {} if adapter is None else dict(adapted_layers(model, adapter))
        for name, layer in layers.items():
            assert adapter is not None
            measured = self._measured(layer, adapter)
            if measured is not None:
                found[name] = measured
        ranked = sorted(found, key=lambda name: -_size(found[name].delta_ratio))
        for name in ranked[: self._intruders]:
            assert adapter is not None
            found[name] = _with_intruders(found[name], layers[name], adapter)
        return found

    def _measured(self, layer: Any, adapter: str) -> ModuleWeights | None:
        weight = _base_weight(layer)
        if weight is None:
            return None
        norm, spectral = self._norm(layer, weight)
        dead = _is_dead(layer, adapter)
        split = _factors(layer, adapter)
        if split is not None:
            a, b = split
            values = _singular_values(a, b)
            inner = float(((b.T @ weight.to(b.dtype)) * a).sum())
        else:
            change = dense_change(layer, adapter)
            if change is None:
                return None
            values = torch.linalg.svdvals(change) if _finite(change) else None
            inner = float((change * weight.to(change.dtype)).sum())
        if values is None:
            nan = float("nan")
            return ModuleWeights(nan, nan, nan, nan, nan, False, dead)
        # Random directions have a cosine of 1 / sqrt(entries); near that a share says nothing.
        clear = float(values.norm()) * weight.numel() ** 0.5 > 10 * norm
        return _of_spectrum(values, inner if clear else 0.0, norm, spectral, dead)

    def _norm(self, layer: Any, weight: Tensor) -> tuple[float, float]:
        """||W||_F and ||W||_2 of the true base, kept: the base does not change."""
        if layer not in self._norms:
            dense = weight.float()
            self._norms[layer] = (float(dense.norm()), spectral_norm(dense))
        return self._norms[layer]


def active_adapter(model: nn.Module) -> str | None:
    """The first active adapter of a PEFT model; None of any other model."""
    config = getattr(model, "peft_config", None)
    if not isinstance(config, Mapping) or not config:
        return None
    active = getattr(model, "active_adapter", None)
    if isinstance(active, str) and active in config:
        return active
    return str(next(iter(config)))


def adapted_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """Layers that hold a tensor of the adapter, by their name in the base model."""
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and any(True for _ in own_tensors(layer, adapter)):
            yield name.removeprefix(PEFT_PREFIX), layer


def own_tensors(layer: Any, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """The parameters (and buffers kept as weights) of one adapter in one of PEFT's layers."""
    for attribute in layer.adapter_layer_names:
        held = getattr(layer, attribute, None)
        if held is None or adapter not in held:
            continue
        part = held[adapter]
        if isinstance(part, Tensor):
            yield attribute, part
        elif isinstance(part, nn.Module):
            for name, parameter in part.named_parameters():
                yield f"{attribute}.{name}", parameter


def not_finite(model: nn.Module, adapter: str) -> list[str]:
    """Names of the adapter's tensors that hold NaN or infinity."""
    return [
        f"{name}.{part}"
        for name, layer in adapted_layers(model, adapter)
        for part, tensor in own_tensors(layer, adapter)
        if not _finite(tensor.detach())
    ]


@torch.no_grad()
def dense_change(layer: Any, adapter: str) -> Tensor | None:
    """dW (out, in) of one module against the true base, at least fp32; None where there is none
    (functions of activations, prompts, scaled activations)."""
    # PEFT's types raise what they like for what they cannot express.
    with suppress(Exception):
        change: Tensor = layer.get_delta_weight(adapter)
        base = layer.get_base_layer()
        if type(base).__name__ == "Conv1D":
            change = change.T
        change = change.to(torch.promote_types(change.dtype, torch.float32))
        memory = memory_of(layer)
        if memory is not None:
            now = weight_of(base)
            if now is None:
                return None
            before = memory.weight.T if type(base).__name__ == "Conv1D" else memory.weight
            change = change + (now.to(change.dtype) - before.to(change))
        return change
    return None


def spectral_norm(dense: Tensor) -> float:
    """||W||_2 of (out, in) by subspace iteration from a fixed start; from below, within about 1 %.

    An exact SVD of every module takes minutes where this takes seconds.
    """
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(dense.shape[1], min(_COLUMNS, *dense.shape), generator=generator)
    block = block.to(dense)
    for _ in range(_ITERATIONS):
        block = torch.linalg.qr(dense.T @ (dense @ block)).Q
    return float(torch.linalg.svdvals(dense @ block)[0])


def spline_values(model: nn.Module, adapter: str) -> dict[str, float]:
    """`spline.*` of LS-LoRA's functions; {} of an adapter without any.

    deviation: the largest mean |v - k| of a layer, 0 is the identity; layers with a gate of 0 are
    plain LoRA and left out. output_scale, input_scale:
    the smallest in size. reach: how far the narrowest grid goes to both sides of 0. penalty: the
    weight of the regulariser. tanh, soft, clamp: shares of the layers that have it. outside: mean
    share of inputs outside the grid, where they are being counted.
    """
    layers = spline_layers(model, adapter).items()
    found = {name: layer.lora_spline[adapter] for name, layer in layers}
    if not found:
        return {}
    rows, splines = list(measure_splines(found).values()), list(found.values())
    values = {
        "spline.deviation": _largest([row["deviation"] for row in rows if row.get("gate") != 0]),
        "spline.output_scale": min(abs(row["output_scale"]) for row in rows),
        "spline.input_scale": min(abs(row["input_scale"]) for row in rows),
        "spline.reach": min(min(-own.k_min, own.k_max) for own in splines),
        "spline.penalty": min(float(own.reg_weight) for own in splines),
        "spline.tanh": fmean(float(own.normalize == "tanh") for own in splines),
        "spline.soft": fmean(float(own.interpolation_method == "soft") for own in splines),
        "spline.clamp": fmean(float(own.boundary == "clamp") for own in splines),
    }
    counted = [own.outside.share for own in splines if own.outside is not None]
    if counted:
        values["spline.outside"] = fmean(counted)
    return values


def _summary(found: Mapping[str, ModuleWeights]) -> dict[str, float]:
    rows = list(found.values())
    if not rows:
        return {}
    values: dict[str, float] = {"weights.modules": float(len(rows))}
    for key in ("delta_ratio", "spectral_ratio"):
        column = [getattr(row, key) for row in rows]
        values[f"weights.{key}.max"] = _largest(column)
        values[f"weights.{key}.mean"] = fmean(column)
    moved = [row for row in rows if not row.idle]
    for key in ("effective_rank", "stable_rank"):
        if moved:
            values[f"weights.{key}.mean"] = fmean(getattr(row, key) for row in moved)
    if moved:
        values["weights.base_share"] = median(row.base_share for row in moved)
    values["weights.idle"] = fmean(float(row.idle) for row in rows)
    values["weights.dead"] = fmean(float(row.dead) for row in rows)
    intruders = [row.intruders for row in rows if row.intruders is not None]
    if intruders:
        values["weights.intruders"] = float(sum(intruders))
    return values


def _largest(column: list[float]) -> float:
    """0 of nothing; max() would lose a NaN."""
    return float("nan") if any(x != x for x in column) else max(column, default=0.0)


def _size(ratio: float) -> float:
    return ratio if isfinite(ratio) else -1.0


def _base_weight(layer: Any) -> Tensor | None:
    """W (out, in) of the true base, dequantised; None where it is no matrix of a linear module."""
    base = layer.get_base_layer()
    if type(getattr(base, "weight", None)).__name__ in _QUANTISED:
        return dense_weight(base)
    weight, memory = weight_of(base), memory_of(layer)
    if weight is None or not weight.is_floating_point():
        return None
    if memory is None:
        return weight
    stored = memory.weight.to(weight.device)
    transposed: Tensor = stored.T
    return transposed if type(base).__name__ == "Conv1D" else stored


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """A (r, in) and s B (out, r), fp32 at least, of a plain LoRA on a linear module; with what its
    start took out of W as further directions."""
    if not isinstance(layer, LoraLayer) or layer.lora_variant.get(adapter) is not None:
        return None
    if adapter not in layer.lora_A or adapter not in layer.lora_B:
        return None
    memory = memory_of(layer)
    if memory is not None and (memory.A0 is None or memory.B0 is None):
        return None
    work = torch.promote_types(layer.lora_A[adapter].weight.dtype, torch.float32)
    a = layer.lora_A[adapter].weight.detach().to(work)
    b = layer.lora_B[adapter].weight.detach().to(work)
    if a.dim() != 2 or b.dim() != 2:
        return None
    if memory is not None and memory.A0 is not None and memory.B0 is not None:
        a = torch.cat([a, memory.A0.to(a)], 0)
        b = torch.cat([b, -memory.B0.to(b)], 1)
    return a, b * float(layer.scaling[adapter])


def _singular_values(a: Tensor, b: Tensor) -> Tensor | None:
    """Of B A, largest first; None if a factor is not finite."""
    if not _finite(a) or not _finite(b):
        return None
    core = torch.linalg.qr(b.double()).R @ torch.linalg.qr(a.double().T).R.T
    values: Tensor = torch.linalg.svdvals(core)
    return values


def _of_spectrum(
    values: Tensor, inner: float, norm: float, spectral: float, dead: bool
) -> ModuleWeights:
    values = values.double()
    largest, size = float(values[0]), float(values.norm())
    if size == 0:
        return ModuleWeights(0.0, 0.0, 0.0, 0.0, 0.0, True, dead)
    shares = values / values.sum()
    entropy = float(-torch.special.xlogy(shares, shares).sum())
    return ModuleWeights(
        size / norm if norm else float("inf"),
        largest / spectral if spectral else float("inf"),
        exp(entropy),
        (size / largest) ** 2,
        inner / size**2,
        False,
        dead,
    )


def _is_dead(layer: Any, adapter: str) -> bool:
    tensors = [tensor for name, tensor in own_tensors(layer, adapter) if "spline" not in name]
    return bool(tensors) and len(tensors) > 1 and not any(bool(t.detach().any()) for t in tensors)


def _finite(tensor: Tensor) -> bool:
    # NaN and infinity both survive a sum, overflow of which fp64 rules out.
    return isfinite(float(tensor.sum(dtype=torch.float64)))


@torch.no_grad()
def _with_intruders(row: ModuleWeights, layer: Any, adapter: str) -> ModuleWeights:
    weight, split = _base_weight(layer), _factors(layer, adapter)
    if weight is None or row.idle or row.delta_ratio != row.delta_ratio:
        return row
    if min(weight.shape) > _LARGEST_SVD:
        return row
    change = dense_change(layer, adapter) if split is None else split[1] @ split[0]
    if change is None:
        return row
    count = intruders(weight.float(), change.float())
    return replace(row, intruders=count)


def intruders(weight: Tensor, change: Tensor, leading: int = _LEADING) -> int:
    """How many of the `leading` singular vectors of W + dW are unlike every one of W's.

    Vectors are of the shorter side, where the paper takes the left ones; unlike is a largest
    |cosine| below INTRUDER. W, dW (out, in).
    """
    if weight.shape[0] > weight.shape[1]:
        weight, change = weight.T, change.T
    tuned = weight + change
    before = torch.linalg.eigh((weight @ weight.T).double()).eigenvectors
    after = torch.linalg.eigh((tuned @ tuned.T).double()).eigenvectors[:, -leading:]
    return int(((before.T @ after).abs().max(0).values < INTRUDER).sum())
