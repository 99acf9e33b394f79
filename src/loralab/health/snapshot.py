"""The last healthy state of a training, kept in memory to go back to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """What is trained, and the optimiser's state, as they are now; copies on the CPU.

    step: after which it was taken.
    """

    def __init__(self, model: nn.Module, optimizer: Any, step: int) -> None:
        self.step = step
        self._weights = {
            name: p.detach().to("cpu", copy=True)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self._optimizer = None if optimizer is None else _on_cpu(optimizer.state_dict())

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: Any) -> None:
        """Put it back. The schedule goes on from where it is; data that was seen is not again."""
        for name, parameter in model.named_parameters():
            if name in self._weights:
                parameter.copy_(self._weights[name])
        if optimizer is not None and self._optimizer is not None:
            rates = [(group["lr"], group.get("initial_lr")) for group in optimizer.param_groups]
            # A copy: an optimiser takes the tensors it is given for its own.
            optimizer.load_state_dict(copy.deepcopy(self._optimizer))
            for group, (rate, first) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
                if first is not None:
                    group["initial_lr"] = first


def halve_learning_rate(optimizer: Any, scheduler: Any) -> None:
    """Of every step from now on, whatever the schedule."""
    for group in optimizer.param_groups:
        group["lr"] /= 2
        if "initial_lr" in group:
            group["initial_lr"] /= 2
    schedule = getattr(scheduler, "scheduler", scheduler)
    if getattr(schedule, "base_lrs", None):
        schedule.base_lrs = [rate / 2 for rate in schedule.base_lrs]
    if getattr(schedule, "_last_lr", None):
        schedule._last_lr = [rate / 2 for rate in schedule._last_lr]


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_on_cpu(value) for value in state)
    return copy.deepcopy(state)
