"""What splines have learned: how far from the identity, how bent, and whether the grid fits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from loralab.adapters.spline import LoraSpline, OutsideCount
from loralab.adapters.spline_penalty import spline_regularizer, whole
from loralab.errors import UserError


def splines(model: nn.Module, adapter: str = "default") -> dict[str, LoraSpline]:
    """The splines of one adapter by the name of the layer they are on.

    Raises:
        UserError: the model has none.
    """
    found = {
        name: module.lora_spline[adapter]
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_spline", ())
    }
    if not found:
        raise UserError(
            f"adapter {adapter!r}: the model has no spline of that name; expected one made from "
            "an LSLoraConfig"
        )
    return found


@torch.no_grad()
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
    return {name: _measure(own) for name, own in splines(model, adapter).items()}


def _measure(own: LoraSpline) -> dict[str, float]:
    values, knots = whole(own.values).double(), own.knots().double()
    slopes = values.diff() / knots.diff()
    measured = {
        "deviation": float((values - knots).abs().mean()),
        "slope_variance": float(slopes.var(correction=0)),
        "input_scale": float(whole(own.input_scale)),
        "output_scale": float(whole(own.output_scale)),
    }
    if own.gate is not None:
        measured["gate"] = float(whole(own.gate))
    if own.outside is not None:
        measured["outside"] = own.outside.share
    return measured


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


class SplineDiagnosticsCallback(TrainerCallback):  # type: ignore[misc]
    """Adds the diagnostics to what a Transformers or TRL trainer logs.

    Every log line gets, over the layers, `spline/deviation`, `spline/slope_variance`,
    `spline/input_scale`, `spline/output_scale` (means; `_max` beside them), `spline/gate` if gated,
    `spline/regularizer`, and with `measure_outside` `spline/outside` since the last line. After
    training `final` holds `spline_diagnostics` layer by layer. Trackers that run before this
    callback do not see the added values (`trainer.state.log_history` has them all): to have them
    there too, put it first in `trainer.callback_handler.callbacks`.
    """

    def __init__(self, adapter: str = "default", measure_outside: bool = False) -> None:
        self.adapter, self.measure_outside = adapter, measure_outside
        self.final: dict[str, dict[str, float]] = {}
        self._logged = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.weight_decay:
            warnings.warn(
                f"weight_decay is {args.weight_decay}: it pulls the values of splines towards 0, "
                "not the identity; set it to 0 or leave `lora_spline` out of it",
                stacklevel=2,
            )
        self._count(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not at the log itself: the last count is still wanted when training ends.
        if self._logged:
            self._count(kwargs["model"])

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
    ) -> None:
        if logs is None:
            return
        summary = self._summary(kw["model"])
        logs.update(summary)
        if state.log_history:
            state.log_history[-1].update(summary)
        self._logged = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.final = spline_diagnostics(kwargs["model"], self.adapter)
        state.log_history.append({**self._summary(kwargs["model"]), "step": state.global_step})
        for own in splines(kwargs["model"], self.adapter).values():
            own.outside = None

    def _summary(self, model: nn.Module) -> dict[str, float]:
        layers = list(spline_diagnostics(model, self.adapter).values())
        summary = {}
        for key in layers[0]:
            values = [layer[key] for layer in layers]
            summary[f"spline/{key}"] = fmean(values)
            summary[f"spline/{key}_max"] = max(values)
        summary["spline/regularizer"] = float(spline_regularizer(model, self.adapter))
        return summary

    def _count(self, model: nn.Module) -> None:
        for own in splines(model, self.adapter).values():
            own.outside = OutsideCount() if self.measure_outside else None
        self._logged = False
