"""Base weights that move and come back: W := true base + change, without drift.

Perturbing and restoring bf16 weights in place drifts. Here the true base is kept aside, every
change is added to it in fp32 and rounded once, and modules no longer named get it back bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.errors import UserError


class BaseWeights:
    """The true base of every module that has been changed."""

    def __init__(self, model: Any) -> None:
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._true: dict[str, Tensor] = {}
        owners: dict[int, int] = {}
        for module in self._modules.values():
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        self._owners = owners

    @torch.no_grad()
    def set(self, changes: Mapping[str, Tensor]) -> list[str]:
        """Make each named module's weight its true base + change, and every other its true base.

        changes: (out, in) by module name, any float dtype. Returns the names whose weights were
        written. Raises UserError for a module that cannot be changed, before changing any.
        """
        for name, change in changes.items():
            self._check(name, change)
        touched = list(dict.fromkeys([*self._true, *changes]))
        for name in touched:
            module = self._modules[name]
            weight: Tensor = module.weight  # type: ignore[assignment]
            if name not in self._true:
                self._true[name] = weight.detach().clone()
            base = self._true[name]
            if name in changes:
                change = changes[name].to(weight.device, torch.float32)
                weight.copy_(base.float() + (change.t() if isinstance(module, Conv1D) else change))
            else:
                weight.copy_(base)
                del self._true[name]
        return touched

    def _check(self, name: str, change: Tensor) -> None:
        module = self._modules.get(name)
        if not isinstance(module, nn.Linear | Conv1D):
            kind = "no module of the model" if module is None else f"a {type(module).__name__}"
            raise UserError(f"cannot change {name!r}: it is {kind}, not a linear layer")
        weight: Tensor = module.weight
        if self._owners[id(weight)] > 1:
            raise UserError(
                f"cannot change {name!r}: another module shares its weight (tied embeddings?)"
            )
        shape = weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape
        if change.shape != shape:
            raise UserError(
                f"the change of {name!r} has shape {tuple(change.shape)}: expected {tuple(shape)}"
            )
