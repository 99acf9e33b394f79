"""The serving contract on the batched engine, each backend with a tiny Llama."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch

import tiny
from loralab.engines.base import Request
from loralab.engines.batched import BatchedEngine
from serving_contract import ServingContract, Subject, ending_request, tiny_adapters, tiny_prompts


class OnTiny(ServingContract):
    backend: ClassVar[Literal["torch", "native"]]
    dtype: ClassVar[torch.dtype]

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls) -> Subject:
        return subject_of(cls.backend, cls.dtype, tiny.tokenizer(), "<bos>")


def subject_of(
    backend: Literal["torch", "native"], dtype: torch.dtype, tokenizer: Any, begins: str | None
) -> Subject:
    model = tiny.model("llama", dtype)
    engine = BatchedEngine(model, tokenizer, backend=backend, threads=1)
    ends = frozenset({tiny.EOS})
    return Subject(
        engine,
        tiny_adapters(model),
        tiny_prompts(),
        ending=ending_request(engine, ends),
        ends=ends,
        context=model.config.max_position_embeddings,
        begins=begins,
    )


class TestTorch(OnTiny):
    backend = "torch"
    dtype = torch.float32


class TestNative(OnTiny):
    backend = "native"
    dtype = torch.bfloat16


def test_an_empty_prompt_without_a_beginning_token_is_an_error() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = None
    subject = subject_of("torch", torch.float32, tokenizer, None)
    ServingContract().test_an_empty_prompt_is_its_own_affair(subject)
    named = subject.generate([Request("", "m1")])[0]
    assert "'m1'" in str(named.error)
