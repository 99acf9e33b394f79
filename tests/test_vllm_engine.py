"""The serving contract on the real vLLM, which has an environment of its own: make test-vllm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
from loralab.engines.batched import BatchedEngine
from loralab.engines.vllm import VllmEngine
from loralab.engines.vllm_start import Options
from serving_contract import (
    ServingContract,
    Subject,
    ending_request,
    tiny_adapters,
    tiny_prompts,
)

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

OPTIONS = Options(max_loras=3, max_rank=8, sequences=32, context=96, memory_gb=0.1)
"""Fewer places than members: 5 go through 3."""


def save_tiny(folder: Path) -> Any:
    """A tiny Llama with heads of a width that vLLM's attention on a CPU takes."""
    config = tiny.CONFIGS["llama"]()
    config.head_dim = 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            size = 0.25 if parameter.dim() >= 2 else 0.2
            parameter.data.mul_(parameter.dim() < 2).add_(size * torch.randn_like(parameter))
    model.eval()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


class TestVllm(ServingContract):
    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        folder = tmp_path_factory.mktemp("model")
        model = save_tiny(folder)
        engine = VllmEngine(str(folder), "float32", OPTIONS)
        ends = frozenset({tiny.EOS})
        yield Subject(
            engine,
            tiny_adapters(model),
            tiny_prompts(),
            ending=ending_request(engine, ends),
            ends=ends,
            context=96,
            begins="<bos>",
            reference=BatchedEngine(model, tiny.tokenizer(), backend="torch", threads=1),
        )
        engine.close()
