"""An engine without a model: how long a text is depends on the adapter, and on nothing else.

Each completion is as long as 120 characters minus the projection of the adapter's B (or of the
change of the weights) on a fixed direction. Conciseness then rewards a search that moves along it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.state import AdapterState
from loralab.config import EvolveConfig, parse
from loralab.engines.base import Completion, Progress, Request
from loralab.evolution.workbench import Workbench

SHAPES = {"layers.0.q": (12, 10), "layers.0.up": (20, 10), "layers.1.q": (12, 10)}


def make_config(**evolution: Any) -> EvolveConfig:
    """A short search on conciseness; `seed`, `dtype` and `task` go to the top level."""
    top = {key: evolution.pop(key) for key in ("seed", "dtype", "task") if key in evolution}
    base = {"generations": 12, "population": 8, "eval_every": 4, "optimizer": {"lr": 2.0}}
    values = {
        "kind": "evolve",
        "name": "fake",
        "model": "fake",
        "dtype": "float32",
        "task": {"name": "conciseness"},
        "adapter": {"rank": 4, "alpha": 4.0},
        "evolution": base | evolution,
    }
    return parse(values | top, "test")


def base_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {n: (torch.randn(s, generator=g) * 0.02).to(dtype) for n, s in SHAPES.items()}


class FakeEngine:
    accepts: frozenset[str] = frozenset({"lora"})

    def __init__(self, kernel: str = "fake", seconds: float = 0.0, gain: float = 150.0) -> None:
        self.kernel = kernel
        self.seconds = seconds
        self.gain = gain
        self.adapters: dict[str, AdapterState] = {}
        self.base: dict[str, Tensor] = {}
        self.seen: list[list[Request]] = []
        g = torch.Generator().manual_seed(1)
        self.direction = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}

    def load(self, adapters: Mapping[str, AdapterState]) -> None:
        self.adapters = dict(adapters)

    def set_base(self, changes: Mapping[str, Tensor]) -> None:
        self.base = {name: change.clone() for name, change in changes.items()}

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[Completion]:
        self.seen.append(list(requests))
        time.sleep(self.seconds)
        lengths = {name: self._length(name) for name in {r.adapter for r in requests}}
        if progress is not None:
            progress(len(requests), len(requests))
        return [self._answer(r, lengths[r.adapter]) for r in requests]

    def _answer(self, request: Request, length: int) -> Completion:
        return Completion("x" * length, tuple(range(length)), "stop")

    def _length(self, name: str | None) -> int:
        moved = 0.0
        for module, direction in self.direction.items():
            change = torch.zeros(SHAPES[module])
            if name is not None:
                adapter = self.adapters[name]
                a, b = adapter.factors[module]
                change += adapter.scaling * b.float() @ a.float()
            if module in self.base:
                change += self.base[module]
            moved += float((change * direction).sum())
        return max(0, round(120 - self.gain * moved))


def workbench(engine: FakeEngine | None = None, dtype: torch.dtype = torch.float32) -> Workbench:
    def save_model(directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(b"merged")

    return Workbench(engine or FakeEngine(), base_weights(dtype), save_model)
