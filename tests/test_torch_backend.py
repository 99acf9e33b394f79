"""The PyTorch backend keeps the engine's contract, with moving and with fixed shapes."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from engine_contract import EngineContract
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.models.load import load


class TestTorch(EngineContract):
    def engine(self, model: Any, tokenizer: Any, **options: Any) -> BatchedEngine:
        return BatchedEngine(model, tokenizer, backend="torch", threads=1, **options)


class TestTorchFixedShapes(TestTorch):
    """The path that CUDA graphs replay, on the CPU."""

    def engine(self, model: Any, tokenizer: Any, **options: Any) -> BatchedEngine:
        made = super().engine(model, tokenizer, **options)
        made.backend.fixed = True
        return made


@pytest.mark.slow
def test_real_weights_in_float32_agree_with_peft() -> None:
    """SmolLM2, chat prompts, four adapters and the base, token for token."""
    model, tokenizer = load("smollm2", dtype="float32")
    adapters = {f"m{i}": tiny.adapter(model, i, rank=8, scaling=1.0, size=0.01) for i in range(4)}
    engine = BatchedEngine(model, tokenizer, backend="torch")
    engine.load(adapters)
    questions = ("What is the capital of France?", "Explain what a hash table is.", "Hello!")
    requests = [
        Request([{"role": "user", "content": question}], name, Sampling(24))
        for name in [*adapters, None]
        for question in questions
    ]
    reference = tiny.PeftReference(model, adapters)
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        prompt = tokenizer.apply_chat_template(request.prompt, add_generation_prompt=True)
        ids = list(prompt["input_ids"])
        assert completion.tokens == reference.greedy(request.adapter, ids, 24)
