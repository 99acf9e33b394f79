"""A model held still while it is looked at, in the middle of its training too, and its base.

Everything that looking needs otherwise (evaluation mode, standard attention, adapters off) is put
back as it was: modes by module, requires_grad by parameter (PEFT sets it anew when adapters come
back on), random numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from loralab.adapters.true_base import true_base
from loralab.engines.attention import attention_configs
from loralab.errors import UserError

_OURS = "loralab_"
"""Attention of this package's trainers takes sequences laid end to end and no cache. It replaces
SDPA or eager attention only, which is why SDPA stands in for it here."""


def causal_of(model: Any) -> Any:
    """The Transformers model that runs: the one inside a PeftModel, or the model itself.

    Raises:
        UserError: an adapter that is not in the model's modules (virtual tokens).
    """
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and hasattr(model, "get_base_model"):
        for name, config in configs.items():
            if getattr(config, "is_prompt_learning", False):
                raise UserError(
                    f"adapter {name!r} is {config.peft_type.value}, which adds virtual tokens: "
                    "only adapters within the model's layers (LoRA and its like) can be looked at"
                )
        return model.get_base_model()
    return model


@contextmanager
def generators_kept() -> Iterator[None]:
    """Random numbers of PyTorch (each device's), NumPy and Python afterwards as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def held_still(causal: Any) -> Iterator[None]:
    """No gradients, no dropout, attention that can decode; afterwards all as it was."""
    training = [module for module in causal.modules() if module.training]
    trainable = [(p, p.requires_grad) for p in causal.parameters()]
    swapped = [
        (config, config._attn_implementation_internal)
        for config in attention_configs(causal)
        if str(config._attn_implementation_internal).startswith(_OURS)
    ]
    with generators_kept(), torch.no_grad():
        for module in training:
            module.training = False
        for config, _ in swapped:
            config._attn_implementation_internal = "sdpa"
        try:
            yield
        finally:
            for config, name in swapped:
                config._attn_implementation_internal = name
            for module in training:
                module.training = True
            for parameter, wanted in trainable:
                if parameter.requires_grad != wanted:
                    parameter.requires_grad_(wanted)


def has_adapter(model: Any) -> bool:
    """Whether there is anything that can be turned off to give a base."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@contextmanager
def base_of(model: Any) -> Iterator[None]:
    """The true base in the model's place: adapters off, weights as before any start changed them.

    model: a PeftModel, or a Transformers model with PEFT's layers in it.

    Raises:
        UserError: an adapter is merged into the weights; PEFT would unmerge it for good.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise UserError(
                f"{name}: the adapter is merged, so its base is not in the model: unmerge it, or "
                "give the base"
            )
    with true_base(model if hasattr(model, "disable_adapter") else _Injected(model)):
        yield


class _Injected:
    """A model with adapters in its layers and no PeftModel around it, as `true_base` takes one."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = model.modules

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        on = [
            module
            for module in self.modules()
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
            and not module.disable_adapters
        ]
        for module in on:
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in on:
                module.enable_adapters(True)
