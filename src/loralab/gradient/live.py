"""Completions of a model while it is trained, through the batched engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loralab.config.training import GradientConfig
from loralab.engines.attention import attention_configs
from loralab.engines.base import Completion, Progress, Request
from loralab.engines.batched import BatchedEngine
from loralab.gradient.attention import named_attention

_TRAINED = "trained"

MakeRequests = Callable[[str | None], list[Request]]
"""Requests for the adapter of that name; None is the model without any."""


class LiveEngine:
    """Made over the base model, before anything is attached to it.

    Where the engine has a copy of the base in its own form and the adapter is two factors, the
    adapter is loaded into it as any other would be. Elsewhere (other engines, other kinds of
    adapter, the model itself in training) the engine runs the model as it stands.
    """

    def __init__(self, model: Any, tokenizer: Any, config: GradientConfig) -> None:
        self._tokenizer = tokenizer
        self._threads = config.threads
        self._attention = [c._attn_implementation_internal for c in attention_configs(model)]
        self._causal = model
        self._engine = BatchedEngine(model, tokenizer, threads=config.threads)
        plain = config.adapter is not None and config.adapter.type == "lora"
        self._copies = plain and self.kernel.startswith("native")

    @property
    def kernel(self) -> str:
        return self._engine.kernel

    def base(self, requests: MakeRequests, progress: Progress | None = None) -> list[Completion]:
        """What the base answers; call it before the model is changed."""
        return self._engine.generate(requests(None), progress)

    def trained(
        self, model: Any, requests: MakeRequests, progress: Progress | None = None
    ) -> list[Completion]:
        """What the model answers as it is now; random numbers of the training are left alone."""
        from loralab.adapters.extract import state_of

        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            if self._copies:
                self._engine.load({_TRAINED: state_of(model)})
                return self._engine.generate(requests(_TRAINED), progress)
            name = next(iter(self._attention), None)
            with named_attention(self._causal, name):
                engine = BatchedEngine(
                    self._causal, self._tokenizer, backend="torch", threads=self._threads
                )
                return engine.generate(requests(None), progress)
