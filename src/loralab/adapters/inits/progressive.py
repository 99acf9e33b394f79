"""The adapter's scaling rises from 0 to its target over the first steps of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, pi
from typing import Annotated, Any, ClassVar, Literal

import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor
from transformers import TrainerCallback

from loralab.adapters.inits.base import Context, Facts, InitStrategy
from loralab.adapters.inits.check import check
from loralab.adapters.inits.scene import Scene, Site
from loralab.adapters.true_base import true_base
from loralab.errors import UserError
from loralab.registry import INITS

Shape = Literal["linear", "cosine", "adaptive"]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]

_SLOT = "_loralab_progressive"
_PROBE_TEXTS = 4
_PROBE_TOKENS = 64


@dataclass(frozen=True)
class _Alphas:
    """alpha as the config, its pattern and each layer had it for the whole scaling."""

    config: float
    pattern: Mapping[str, float]
    layers: Mapping[str, float]


@dataclass
class ProgressiveScaling:
    """The share of its target scaling that an adapter has, step by step.

    shape: "linear" t, "cosine" (1 - cos(pi t)) / 2 with t = step / steps, and "adaptive": as
        linear, but it rises only while `kl`, the mean KL(base || adapter) in nats a token, is
        under `kl_budget`, and stays where it is otherwise.
    targets: final scaling of each module, by its path.
    """

    shape: Shape
    steps: int
    targets: Mapping[str, float]
    adapter: str = "default"
    kl_budget: float = 0.1
    kl: Callable[[], float] | None = None
    share: float = 0.0
    rising: bool = True
    history: list[tuple[int, float, float | None]] = field(default_factory=list)
    """(step, share, KL measured) at every step of the rise."""
    complete: bool = False
    """Whether a training has come to its end: the share it ended at is then the adapter's own."""
    _whole: _Alphas | None = None

    def step(self, model: PeftModel, step: int) -> float:
        """Set the scaling for a step (0 before the first); the share it now has."""
        if self.history and self.history[-1][0] == step:
            return self.share
        measured = None
        t = min(step / self.steps, 1.0)
        if self.shape == "linear":
            self.share = t
        elif self.shape == "cosine":
            self.share = (1 - cos(pi * t)) / 2
        elif step > 0 and self.share < 1:
            measured = self.kl() if self.kl is not None else 0.0
            if measured < self.kl_budget:
                self.share = min(self.share + 1 / self.steps, 1.0)
        self.rising = step <= self.steps or measured is not None
        if self.rising:
            self.history.append((step, self.share, measured))
        self.apply(model)
        return self.share

    def apply(self, model: PeftModel) -> None:
        """Put the present share of the scaling into the model."""
        for name, target in self.targets.items():
            model.get_submodule(name).scaling[self.adapter] = self.share * target

    def finish(self, model: PeftModel) -> None:
        """Give the adapter's config the alpha that was trained with, so that it is saved with it.

        After a whole rise nothing changes. An adaptive one may end below its target, and a
        training may break off; with the target's alpha the adapter saved would be stronger than
        the one that was trained. `reopen` takes it back.
        """
        if self.share == 1 or self._whole is not None:
            return
        config = model.peft_config[self.adapter]
        layers = {name: model.get_submodule(name).lora_alpha for name in self.targets}
        self._whole = _Alphas(
            config.lora_alpha,
            dict(config.alpha_pattern),
            {name: alphas[self.adapter] for name, alphas in layers.items()},
        )
        config.lora_alpha *= self.share
        config.alpha_pattern = {k: a * self.share for k, a in config.alpha_pattern.items()}
        for alphas in layers.values():
            alphas[self.adapter] *= self.share

    def reopen(self, model: PeftModel) -> None:
        """Undo `finish`: the config's alpha is the target's again, for the rise to go on."""
        self.complete = False
        if self._whole is None:
            return
        config = model.peft_config[self.adapter]
        config.lora_alpha, config.alpha_pattern = self._whole.config, dict(self._whole.pattern)
        for name, alpha in self._whole.layers.items():
            model.get_submodule(name).lora_alpha[self.adapter] = alpha
        self._whole = None

    def begin_again(self, model: PeftModel) -> None:
        """From step 0, as after an initialisation; the factors stay."""
        self.reopen(model)
        self.history.clear()
        self.share = 0.0


class ProgressiveCallback(TrainerCallback):  # type: ignore[misc]
    """Moves a `ProgressiveScaling` under any Transformers or TRL Trainer.

    After a resume the linear and cosine shapes go on from the Trainer's own step; an adaptive one
    from its recorded share, which is kept in the Trainer's state. A training after one that came
    to its end (DPO after SFT) leaves the scaling where that one left it; after one that broke off
    the rise begins again.
    """

    def __init__(self, schedule: ProgressiveScaling) -> None:
        self.schedule = schedule

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = _peft(kwargs["model"])
        kept = next(
            (row["adapter_share"] for row in reversed(state.log_history) if "adapter_share" in row),
            None,
        )
        resumed = state.global_step > 0
        if self.schedule.complete and kept is None and self.schedule.share > 0:
            return
        if not resumed:
            self.schedule.begin_again(model)
            self.schedule.step(model, 0)
            return
        self.schedule.reopen(model)
        if kept is not None:
            self.schedule.share = float(kept)
        if self.schedule.shape == "adaptive":
            self.schedule.apply(model)
        else:
            self.schedule.step(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.schedule.complete:
            return
        share = self.schedule.step(_peft(kwargs["model"]), state.global_step)
        # Straight into the state's history, which checkpoints carry: a log may be every hundredth
        # step, and what `on_log` adds to one reaches neither the history nor the trackers.
        if self.schedule.rising:
            state.log_history.append({"adapter_share": share, "step": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.finish(_peft(kwargs["model"]))
        self.schedule.complete |= state.global_step >= state.max_steps


@dataclass(frozen=True)
class Progressive:
    """Scaling 0 at step 0, its target after `steps`; the factors start as `start` says.

    With both factors non-zero both learn as soon as the scaling is not 0. `callback_for(model)` is
    the TrainerCallback that moves it; loralab's own runs add it themselves.

    start: any initialisation that leaves the base as it is; start_options are its own.
    shape, steps, kl_budget: see `ProgressiveScaling`. The KL of "adaptive" is measured on the
        calibration texts, against the true base.
    """

    facts: ClassVar = Facts(
        formula="s(t) = share(t)·α/r, share from 0 to 1: linear, cosine, or while KL < budget",
        source="this project",
        unchanged="exactly, whatever the factors",
        cost="none; adaptive: a forward pass of two models a step of the rise",
        needs="the callback in the Trainer; adaptive: calibration text",
    )
    start: str = "tiny"
    shape: Shape = "linear"
    steps: Count = 100
    kl_budget: Positive = 0.1
    start_options: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, scene: Scene) -> Mapping[str, float]:
        strategy = INITS.create(self.start, self.start_options)
        if not isinstance(strategy, InitStrategy) or strategy.facts.changes_base:
            raise UserError(
                f"progressive: start is {self.start!r}; expected one that leaves the base as it is "
                "and starts module by module, such as tiny, orthogonal or zero_b"
            )
        check(strategy.facts, f"progressive: start {self.start}", scene.sites)
        kl = KL(scene.model, scene.token_rows) if self.shape == "adaptive" else None
        made = [
            strategy(site.weight(), site.rank, scene.generator(site.name), Context(site, scene))
            for site in scene.sites
        ]
        for site, init in zip(scene.sites, made, strict=True):
            site.set(init.A, init.B)
        targets = _scalings(scene.model, scene.sites)
        schedule = ProgressiveScaling(
            self.shape, self.steps, targets, scene.adapter, self.kl_budget, kl
        )
        set_schedule(scene.model, schedule)
        schedule.step(scene.model, 0)
        return {}


def schedule_of(model: PeftModel) -> ProgressiveScaling | None:
    """The schedule of a progressive start; None for every other start."""
    return getattr(model, _SLOT, None)


def set_schedule(model: PeftModel, schedule: ProgressiveScaling | None) -> None:
    """Make it the model's schedule. No scaling changes."""
    # A plain attribute: not in the state dict.
    object.__setattr__(model, _SLOT, schedule)


def stop_rising(model: PeftModel) -> None:
    """Take a progressive start back: every scaling and alpha at its target, no schedule."""
    schedule = schedule_of(model)
    if schedule is not None:
        schedule.reopen(model)
        schedule.share = 1.0
        schedule.apply(model)
        set_schedule(model, None)


def callback_for(model: PeftModel) -> ProgressiveCallback | None:
    """The callback a progressive start needs in its Trainer; None for every other start."""
    schedule = schedule_of(model)
    return None if schedule is None else ProgressiveCallback(schedule)


@dataclass(frozen=True)
class KL:
    """Mean KL(base || model as it is) in nats a token, on a few short texts."""

    model: PeftModel
    rows: Sequence[Tensor]

    def __call__(self) -> float:
        total, tokens = 0.0, 0
        # Asked now: the model may have moved since it was started.
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for row in self.rows[:_PROBE_TEXTS]:
                    ids = row[:, :_PROBE_TOKENS].to(device)
                    with true_base(self.model):
                        base = self.model(input_ids=ids).logits.float().log_softmax(-1)
                    now = self.model(input_ids=ids).logits.float().log_softmax(-1)
                    total += float((base.exp() * (base - now)).sum())
                    tokens += ids.shape[1]
        finally:
            self.model.train(was_training)
        return total / tokens


def _scalings(model: PeftModel, sites: Sequence[Site]) -> dict[str, float]:
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(site.layer)]: site.scaling for site in sites}


def _peft(model: Any) -> PeftModel:
    """The PEFT model inside DDP's or the like's wrapper."""
    while not isinstance(model, PeftModel):
        model = model.module
    return model
