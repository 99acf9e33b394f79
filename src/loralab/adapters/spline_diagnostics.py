"""What splines have learned: how far from the identity, how bent, and whether the grid fits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loralab.adapters.spline import LoraSpline, OutsideCount
from loralab.adapters.spline_penalty import whole
from loralab.errors import UserError

Name = TypeVar("Name")


def spline_layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """The layers that hold a spline of one adapter, by name; {} if the model has none."""
    return {
        name: module
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_spline", ())
    }


def splines(model: nn.Module, adapter: str = "default") -> dict[str, LoraSpline]:
    """The splines of one adapter by the name of the layer they are on.

    Raises:
        UserError: the model has none.
    """
    found = spline_layers(model, adapter)
    if not found:
        raise UserError(
            f"adapter {adapter!r}: the model has no spline of that name; expected one made from "
            "an LSLoraConfig"
        )
    return {name: layer.lora_spline[adapter] for name, layer in found.items()}


def spline_diagnostics(model: nn.Module, adapter: str = "default") -> dict[str, dict[str, float]]:
    """By layer:

    deviation: mean_j |v_j - k_j|; 0 is the identity.
    slope_variance: of the slopes of the segments; 0 is a straight line.
    input_scale, output_scale, and gate if there is one.
    outside: the share of inputs i z outside [k_min, k_max], from 0 to 1, if measured with
        `count_outside`. With normalize="tanh" it is of i tanh(z).

    Raises:
        UserError: the model has no such adapter.
    """
    found = splines(model, adapter)
    measured = measure(found)
    for name, own in found.items():
        if own.outside is not None:
            measured[name]["outside"] = own.outside.share
    return measured


@torch.no_grad()
def measure(found: Mapping[str, LoraSpline]) -> dict[str, dict[str, float]]:
    """`spline_diagnostics` of these splines, but for `outside`; those of one grid together."""
    measured = {}
    for names in _alike(found):
        for name, numbers in zip(names, _measured([found[name] for name in names]), strict=True):
            measured[name] = numbers
    return {name: measured[name] for name in found}


@torch.no_grad()
def regularizer(found: Iterable[LoraSpline]) -> float:
    """The value of `spline_regularizer` over these splines."""
    by_name = dict(enumerate(found))
    total = 0.0
    for names in _alike(by_name):
        alike = [by_name[name] for name in names]
        weights = torch.tensor([own.reg_weight for own in alike], dtype=torch.float64)
        squares = (_stacked(alike, "values") - alike[0].knots().double()).square().mean(1)
        total += float((weights * squares.cpu()).sum())
    return total


def _alike(found: Mapping[Name, LoraSpline]) -> Iterable[list[Name]]:
    """Names of splines whose parameters can be stacked."""
    groups: dict[Any, list[Name]] = defaultdict(list)
    for name, own in found.items():
        grid = (own.num_knots, own.k_min, own.k_max, own.values.dtype, own.values.device)
        groups[grid, own.gate is None].append(name)
    return groups.values()


def _stacked(alike: Sequence[LoraSpline], part: str) -> Tensor:
    return torch.stack([whole(getattr(own, part)) for own in alike]).double()


def _measured(alike: Sequence[LoraSpline]) -> list[dict[str, float]]:
    values, knots = _stacked(alike, "values"), alike[0].knots().double()
    columns = {
        "deviation": (values - knots).abs().mean(1),
        "slope_variance": (values.diff() / knots.diff()).var(1, correction=0),
        "input_scale": _stacked(alike, "input_scale")[:, 0],
        "output_scale": _stacked(alike, "output_scale")[:, 0],
    }
    if alike[0].gate is not None:
        columns["gate"] = _stacked(alike, "gate")[:, 0]
    rows = torch.stack(list(columns.values()), 1).tolist()
    return [dict(zip(columns, row, strict=True)) for row in rows]


@contextmanager
def count_outside(model: nn.Module, adapter: str = "default") -> Iterator[None]:
    """Count in every forward pass the inputs outside the grid, padding included.

        with count_outside(model):
            model(**batch)
            shares = spline_diagnostics(model)

    Costs two comparisons an activation. Passes that skip the layers' own forward (a fused one) are
    not counted.
    """
    found = splines(model, adapter).values()
    for own in found:
        own.outside = OutsideCount()
    try:
        yield
    finally:
        for own in found:
            own.outside = None
