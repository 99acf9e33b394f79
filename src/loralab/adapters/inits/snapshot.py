"""A model's adapter and all that its initialisation may touch, to be put back if it fails."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loralab.adapters.inits.progressive import ProgressiveScaling, schedule_of, set_schedule
from loralab.adapters.inits.scene import Scene
from loralab.adapters.true_base import Memory, memory_of, remember, restore

_TABLES = ("r", "lora_alpha", "scaling", "lora_A", "lora_B")
"""What PEFT keeps by adapter in a layer; EVA may give a module another rank, so other factors."""


@dataclass(frozen=True)
class _Layer:
    tables: Mapping[str, Any]
    a: Tensor
    b: Tensor
    frozen: Any
    memory: Memory | None
    weight: Tensor


class Snapshot:
    """What a start changes, copied: the factors, the config, the schedule, who is trained.

    Weights are not copied. A start that changes one remembers it first, so the true one is always
    there; one that an earlier start changed is kept by reference while `restore` puts another
    tensor in its place.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._sites = scene.sites
        model = scene.model
        self._training = model.training
        self._requires_grad = [(p, p.requires_grad) for p in model.parameters()]
        config = model.peft_config[scene.adapter]
        self._config = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(config).items()
        }
        self._schedule = schedule_of(model)
        self._rise = None if self._schedule is None else _fields(self._schedule)
        self._layers = [
            _Layer(
                {table: getattr(site.layer, table)[site.adapter] for table in _TABLES},
                site.A.detach().clone(),
                site.B.detach().clone(),
                site.layer.frozen_peft_weight_names,
                memory_of(site.layer),
                site.layer.get_base_layer().weight.data,
            )
            for site in self._sites
        ]

    def put_back(self) -> None:
        """Make the model what it was."""
        model, adapter = self._scene.model, self._scene.adapter
        restore(model)
        for site, kept in zip(self._sites, self._layers, strict=True):
            for table, value in kept.tables.items():
                getattr(site.layer, table)[adapter] = value
            site.A.data, site.B.data = kept.a, kept.b
            site.layer.frozen_peft_weight_names = kept.frozen
            if kept.memory is not None:
                # Anew: on the CPU the old memory's tensor has become the weight itself.
                remember(site.layer, kept.memory.adapter)
                memory = memory_of(site.layer)
                assert memory is not None
                memory.A0, memory.B0 = kept.memory.A0, kept.memory.B0
                site.layer.get_base_layer().weight.data = kept.weight
        config = vars(model.peft_config[adapter])
        config.clear()
        config.update(self._config)
        if self._schedule is not None and self._rise is not None:
            vars(self._schedule).update(self._rise)
        set_schedule(model, self._schedule)
        for parameter, required in self._requires_grad:
            parameter.requires_grad_(required)
        if model.training != self._training:
            model.train(self._training)


def _fields(schedule: ProgressiveScaling) -> dict[str, Any]:
    fields = dict(vars(schedule))
    fields["history"] = copy.copy(schedule.history)
    return fields
