"""A training's own numbers, taken by hooks that cost little: raw losses, gradients, updates.

The raw loss is read where the model returns it: a Trainer logs one of many steps, and
`logging_nan_inf_filter` hides every step that was NaN. Where the model returns none the log has to
do, and the gradients tell what is no number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import inf, isfinite, nan, sqrt
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from loralab.health.population import population_values

FIRST = 5
"""Steps whose mean loss is the first loss, and that make the newest."""
NORMS = 100
"""Gradient norms whose median is the usual one."""
SAMPLED = 4096
"""Entries of a tensor that are kept to tell whether it moved."""


class TrainingWatch:
    """From `begin` to `end`. The caller says when a step's gradients are there and when it is done.

    fp16: gradients that overflow are then a part of the loss scaling, whose steps are skipped.
    planned: sum of the learning rate over all steps, NaN if unknown. steps: in all, 0 if unknown.
    """

    def __init__(
        self, model: nn.Module, *, fp16: bool = False, planned: float = nan, steps: int = 0
    ) -> None:
        self._model, self._fp16 = model, fp16
        self._planned, self._of = planned, steps
        self._handle: Any = None
        self._raw: list[Tensor] = []
        self._parts = False
        self._losses, self._logged = Losses(), Losses()
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._rewards: list[Mapping[str, Any]] = []
        self._seen = self._empty = 0
        self._before: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._ratio = nan
        self._by_module: dict[str, float] = {}
        self.nonfinite = 0
        self.step, self.epoch = 0, nan

    def begin(self) -> None:
        self.end()
        self._handle = self._model.register_forward_hook(self._look_at_loss, with_kwargs=True)
        self._kept = self._sample()

    def end(self) -> None:
        """Take the hook out; the numbers stay."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def gradients_ready(self, compare: bool = False) -> bool:
        """Before the optimiser's step: whether all is finite.

        compare: keep the weights, so that the size of this step's update can be told after it.
        """
        named = self._trainable()
        grads = [(n, p.grad) for n, p in named if p.grad is not None and not p.grad.is_sparse]
        losses = [value.float().mean().reshape(1) for value in self._raw]
        self._raw = []
        raw: list[float] = torch.cat(losses).tolist() if losses else []
        lost = not all(map(isfinite, raw))
        if raw and not lost:
            self._losses.add(self.step + 1, sum(raw) if self._parts else fmean(raw))
        norms = _norms([grad for _, grad in grads])
        total = sqrt(sum(norm**2 for norm in norms)) if norms else nan
        self._seen += 1
        self._empty += total == 0 or not norms
        sound = not lost and (self._fp16 or not norms or isfinite(total))
        if not sound:
            self.nonfinite += 1
        elif norms and isfinite(total):
            self._by_module = _grouped([name for name, _ in grads], norms)
        if compare:
            self._before = {name: p.detach().clone() for name, p in named}
        return sound

    def step_done(self, step: int, epoch: float | None) -> None:
        """After the optimiser's step."""
        self.step, self.epoch = step, nan if epoch is None else epoch
        if self._before:
            moved = size = 0.0
            for name, parameter in self._trainable():
                before = self._before.get(name)
                if before is not None:
                    moved += float((parameter.detach() - before).float().norm()) ** 2
                    size += float(before.float().norm()) ** 2
            self._ratio = sqrt(moved / size) if size > 0 else inf
            self._before = {}

    def logged(self, step: int, logs: Mapping[str, Any]) -> None:
        """What the Trainer tells of a step: the loss, which may be a mean over several steps, the
        gradient's norm before it was clipped, and of a policy its reward."""
        loss, norm = float(logs.get("loss", nan)), float(logs.get("grad_norm", nan))
        if isfinite(loss):
            self._logged.add(step, loss)
        if isfinite(norm):
            self._norms.append(norm)
        reward = logs.get("reward_mean", logs.get("reward"))
        if reward is not None:
            self._rewards.append({"reward_mean": reward, "correct": logs.get("correct")})

    def forget(self, step: int) -> None:
        """What was seen after a step, to whose weights a training went back."""
        self.nonfinite = 0
        self._losses.forget(step)
        self._logged.forget(step)
        self._norms.clear()

    def values(self, rows: int | None = None) -> dict[str, float]:
        """Everything since the beginning.

        train.nonfinite: steps with a loss or gradient that is no number. train.loss: mean of the
        newest FIRST steps, as the model returns it, else as it is logged; train.loss_first: of the
        first ones. train.loss_rise: (newest loss - first loss) over the first, or over 1 nat if
        that is less; train.loss_share: newest over first. train.dose: planned sum of the learning
        rate, of optimisers of Adam's kind.
        grad.spike: newest norm over the median of the last NORMS. grad.norm.max: of a module, after
        clipping. grad.zero: share of steps without any gradient.
        es.*: of a policy's rewards, as `population_values` tells them of a search's generations.
        update.ratio: of one step's update to the norm of what is trained. update.none: share of
        tensors that no step has moved since the last call. data.passes: over the rows.
        """
        found: dict[str, float] = {
            "train.step": float(self.step),
            "train.nonfinite": float(self.nonfinite),
            "train.dose": self._planned,
        }
        if self._of:
            found["train.progress"] = self.step / self._of
        if rows is not None:
            found |= {"data.rows": float(rows), "data.passes": self.epoch}
        losses = self._losses if self._losses.seen else self._logged
        if losses.seen:
            first, newest = losses.first(), losses.newest()
            found |= {"train.loss": newest, "train.loss_first": first}
            found["train.loss_rise"] = (newest - first) / max(abs(first), 1.0)
            found["train.loss_share"] = newest / first if first > 0 else nan
        if self._norms:
            found["grad.norm"] = self._norms[-1]
            usual = median(self._norms)
            found["grad.spike"] = self._norms[-1] / usual if usual > 0 else nan
        if self._rewards:
            found |= population_values(self._rewards)
        if self._by_module:
            found["grad.norm.max"] = max(self._by_module.values())
        if self._seen:
            found["grad.zero"] = self._empty / self._seen
            found["update.ratio"] = self._ratio
            found["update.none"] = self._standing()
        return found

    def by_module(self) -> Mapping[str, float]:
        """The newest gradient norm of each module that is trained."""
        return self._by_module

    def _standing(self) -> float:
        now = self._sample()
        same = [torch.equal(now[name], old) for name, old in self._kept.items() if name in now]
        self._kept = now
        return sum(same) / len(same) if same else nan

    def _sample(self) -> dict[str, Tensor]:
        return {name: _some(p) for name, p in self._trainable()}

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]

    def _look_at_loss(
        self, model: nn.Module, inputs: Any, named: Mapping[str, Any], outputs: Any
    ) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor):
            self._raw.append(loss.detach())
            # Over all labels of a step that is accumulated: its parts add up to the loss.
            self._parts = named.get("num_items_in_batch") is not None


class Losses:
    """Of the first steps and of the newest; `FIRST` steps each, of which some may have none."""

    def __init__(self) -> None:
        self._first: list[tuple[int, float]] = []
        self._newest: deque[tuple[int, float]] = deque(maxlen=FIRST)

    @property
    def seen(self) -> bool:
        return bool(self._first)

    def add(self, step: int, loss: float) -> None:
        if not self._first or step < self._first[0][0] + FIRST:
            self._first.append((step, loss))
        self._newest.append((step, loss))

    def first(self) -> float:
        """Mean."""
        return fmean(loss for _, loss in self._first)

    def newest(self) -> float:
        """Mean; the first ones' where those after them are forgotten."""
        rows = self._newest or self._first
        ended = rows[-1][0]
        return fmean(loss for step, loss in rows if step > ended - FIRST)

    def forget(self, step: int) -> None:
        """Those after a step."""
        self._first = [row for row in self._first if row[0] <= step]
        kept = [row for row in self._newest if row[0] <= step]
        self._newest = deque(kept, maxlen=FIRST)


def planned_dose(optimizer: Any, scheduler: Any, steps: int) -> float:
    """Sum of the learning rate over a training of `steps`; NaN where the schedule cannot be asked,
    or where the optimiser's steps have no size of their own (SGD)."""
    inner = getattr(optimizer, "optimizer", optimizer)
    name = type(inner).__name__.lower()
    if not any(kind in name for kind in ("adam", "adafactor", "lion")):
        return nan
    schedule = getattr(scheduler, "scheduler", scheduler)
    shapes, rates = getattr(schedule, "lr_lambdas", None), getattr(schedule, "base_lrs", None)
    if not shapes or not rates or steps < 1:
        return nan
    return float(
        max(sum(r * f(s) for s in range(steps)) for r, f in zip(rates, shapes, strict=True))
    )


def _norms(grads: list[Tensor]) -> list[float]:
    """Each one's norm, read back at once: asking one by one would stall a GPU as often."""
    if not grads:
        return []
    norms = torch._foreach_norm(grads)
    device = norms[0].device
    values: list[float] = torch.stack([n.float().to(device) for n in norms]).tolist()
    return values


def _grouped(names: list[str], norms: list[float]) -> dict[str, float]:
    """By module: "...q_proj.lora_A.default.weight" and lora_B are one."""
    squares: dict[str, float] = {}
    for name, norm in zip(names, norms, strict=True):
        module = name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
        squares[module] = squares.get(module, 0.0) + norm**2
    return {module: sqrt(total) for module, total in squares.items()}


def _some(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)].clone()
