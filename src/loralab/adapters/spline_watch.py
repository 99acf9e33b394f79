"""Splines watched while they train: what they have learned, and how many inputs miss their grid.

The share outside the grid is of inputs that training saw: in some steps, some tokens of what goes
into each layer. z is made from them beside the layer's own forward, which stays what it was: a
fused one goes on running, and dropout draws what it would have drawn.
"""

from __future__ import annotations

import warnings
from math import ceil
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from loralab.adapters.nonlinear import product
from loralab.adapters.spline import OutsideCount
from loralab.adapters.spline_diagnostics import measure, regularizer, spline_layers, splines
from loralab.adapters.spline_penalty import whole

SPACING = 10
"""Steps from one sample of the inputs to the next, at least."""
TOKENS = 16
"""Looked at of each forward pass of a layer, about: evenly spread over the batch."""


class OutsideSample:
    """The share of spline inputs outside the grid, from some tokens of a model's forward passes.

    Dropout is left out. A spline on weights has its whole update counted instead.
    """

    def __init__(self, model: nn.Module, adapter: str = "default") -> None:
        self._layers, self._adapter = spline_layers(model, adapter), adapter
        self._counts: dict[str, OutsideCount] = {}
        self._handles: list[Any] = []

    def begin(self) -> None:
        """Count from nothing, in every forward pass until `end`."""
        self.clear()
        self._counts = {name: OutsideCount() for name in self._layers}
        for name, layer in self._layers.items():
            if layer.lora_variant[self._adapter].space == "activation":
                self._handles.append(layer.register_forward_pre_hook(self._looking(name)))

    def clear(self) -> None:
        """Count no more, and forget what was counted."""
        self.end()
        self._counts = {}

    def end(self) -> None:
        """Count no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def shares(self) -> dict[str, float]:
        """From 0 to 1 by layer, of those whose inputs were seen."""
        for name, count in self._counts.items():
            layer = self._layers[name]
            if not count.seen and layer.lora_variant[self._adapter].space == "weight":
                self._add(name, product(layer, self._adapter))
        return {name: count.share for name, count in self._counts.items() if count.seen}

    def _looking(self, name: str) -> Any:
        def look(layer: Any, arguments: tuple[Any, ...]) -> None:
            on = not layer.disable_adapters and self._adapter in layer.active_adapters
            if not on or layer.merged or not arguments:
                return
            x = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            some = x[:: max(1, x.shape[0] // TOKENS)].float()
            with torch.no_grad(), torch.autocast(device_type=x.device.type, enabled=False):
                a, b = (getattr(layer, f"lora_{part}")[self._adapter].weight for part in "AB")
                self._add(name, some @ whole(a).float().T @ whole(b).float().T)

        return look

    @torch.no_grad()
    def _add(self, name: str, ba: Tensor) -> None:
        layer = self._layers[name]
        own = layer.lora_spline[self._adapter]
        z = own.placed(ba * layer.scaling[self._adapter])
        self._counts[name].add(z, own.k_min, own.k_max)


class SplineWatch:
    """One adapter's splines through a training.

    Inputs are sampled in the first step, the last, and about every tenth: those of `log_every`.
    history: `summary` after every sampled step, with its `step`.
    """

    def __init__(self, model: nn.Module, adapter: str = "default", log_every: int = 1) -> None:
        self._every = log_every * ceil(SPACING / log_every)
        self.history: list[dict[str, float]] = []
        self._splines = splines(model, adapter)
        self._sample = OutsideSample(model, adapter)
        self._sampling = False

    @staticmethod
    def of(model: nn.Module, adapter: str = "default", log_every: int = 1) -> SplineWatch | None:
        """A watch; None of a model without splines."""
        return SplineWatch(model, adapter, log_every) if spline_layers(model, adapter) else None

    def before_step(self, step: int, of: int) -> None:
        """Before the forward passes of a step; steps count from 1."""
        self._sampling = step in (1, of) or step % self._every == 0
        # What is told of a step is of that step: a resumed training then tells the same.
        if self._sampling:
            self._sample.begin()
        else:
            self._sample.clear()

    def after_step(self, step: int) -> None:
        """After the step's update, before anything else runs the model."""
        if self._sampling:
            self.end()
            self.history.append({"step": step, **self.summary()})

    def end(self) -> None:
        """Stop looking, also where a training broke off within a step."""
        self._sample.end()
        self._sampling = False

    def by_layer(self) -> dict[str, dict[str, float]]:
        """`spline_diagnostics`, with the share of inputs `outside` if this step was sampled."""
        outside = self._sample.shares()
        return {
            name: numbers | ({"outside": outside[name]} if name in outside else {})
            for name, numbers in measure(self._splines).items()
        }

    def summary(self) -> dict[str, float]:
        """Means over the layers of what `by_layer` says, the largest of each as `_max`, and the
        `regularizer`."""
        layers = self.by_layer().values()
        told: dict[str, float] = {}
        for key in dict.fromkeys(key for layer in layers for key in layer):
            values = [layer[key] for layer in layers if key in layer]
            told[key], told[f"{key}_max"] = fmean(values), max(values)
        told["regularizer"] = regularizer(self._splines.values())
        return told


class SplineDiagnosticsCallback(TrainerCallback):  # type: ignore[misc]
    """Adds the diagnostics to what a Transformers or TRL trainer logs.

    Every log line gets `spline/deviation` and the others of `SplineWatch.summary`; about every
    tenth step's, the first and the last also `spline/outside`. After training `final` holds its
    `by_layer`. Trackers that run before this callback do not see the added values
    (`trainer.state.log_history` has them all): to have them there too, put it first in
    `trainer.callback_handler.callbacks`.

    loralab's own runs do this themselves, see `loralab.gradient.diary`.
    """

    def __init__(self, adapter: str = "default") -> None:
        self.adapter = adapter
        self.final: dict[str, dict[str, float]] = {}
        self.history: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.weight_decay:
            warnings.warn(decay_advice(args.weight_decay), stacklevel=2)
        log_every = max(1, int(state.logging_steps or 1))
        self._watch = SplineWatch(kwargs["model"], self.adapter, log_every)
        self.history = self._watch.history

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.before_step(state.global_step + 1, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.after_step(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
    ) -> None:
        if logs is None:
            return
        summary = {f"spline/{key}": value for key, value in self._watch.summary().items()}
        logs.update(summary)
        if state.log_history:
            state.log_history[-1].update(summary)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.end()
        self.final = self._watch.by_layer()


def decay_advice(weight_decay: float) -> str:
    """What to say of weight decay on splines."""
    return (
        f"weight_decay is {weight_decay}: it pulls the values of splines towards 0, not the "
        "identity; set it to 0 or leave `lora_spline` out of it"
    )
