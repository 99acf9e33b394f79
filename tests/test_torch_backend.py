"""The PyTorch backend keeps the engine's contract, with moving and with fixed shapes."""

from __future__ import annotations

from typing import Any

from engine_contract import EngineContract
from loralab.engines.batched import BatchedEngine


class TestTorch(EngineContract):
    def engine(self, model: Any, tokenizer: Any, **options: Any) -> BatchedEngine:
        return BatchedEngine(model, tokenizer, backend="torch", threads=1, **options)


class TestTorchFixedShapes(TestTorch):
    """The path that CUDA graphs replay, on the CPU."""

    def engine(self, model: Any, tokenizer: Any, **options: Any) -> BatchedEngine:
        made = super().engine(model, tokenizer, **options)
        made._backend.fixed = True  # type: ignore[attr-defined]
        return made
