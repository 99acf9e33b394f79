"""The backend that runs any Transformers causal language model through its own forward.

Everything the engine needs differently is swapped in for the time of one forward and taken out
after it: linear layers that add each row's adapter, decode attention that folds grouped heads, a
head that sees the last token only. The user's model is the same object before and after.

On CUDA decode steps have fixed shapes and are replayed as CUDA graphs; a CPU can take the same
fixed-shape path (`fixed=True`), which is how it is tested. It has not been run on a GPU yet.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from loralab.adapters.state import AdapterState
from loralab.engines.attention import attention_configs, swapped_attention
from loralab.engines.cache import measure_layers
from loralab.engines.lora_linear import Routing, Target, build_stacks, patched
from loralab.engines.torch_session import TorchSession
from loralab.errors import UserError


class TorchBackend:
    """Members of a population over one Transformers model."""

    joins = False

    def __init__(self, model: Any, fixed: bool | None = None) -> None:
        """fixed: keep decode shapes fixed (None: on CUDA only)."""
        self.model = model
        self.config: Any = model.config
        if self.config.is_encoder_decoder:
            raise UserError(
                f"{type(model).__name__} is an encoder-decoder: the batched engine runs causal "
                "language models only"
            )
        self._parameters = set(inspect.signature(model.forward).parameters)
        self._configs = attention_configs(model)
        self._modules = list(model.modules())
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise UserError(f"{type(model).__name__} has no output head: it cannot generate text")
        self._head = head
        self._targets: dict[str, Target] = {}
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.fixed = self.device.type == "cuda" if fixed is None else fixed
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.name = f"torch-{self.device.type}-{dtype}"
        self.layers = measure_layers(self._probe(), type(model).__name__)
        self.slides = any(s is not None and s.window is not None for s in self.layers)

    def _probe(self) -> DynamicCache:
        """Run one token, to see what the model caches."""
        cache = DynamicCache(config=self.config)
        with torch.inference_mode(), self._quiet():
            token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self.model(input_ids=token, past_key_values=cache, use_cache=True)
        return cache

    def load(self, adapters: Sequence[AdapterState]) -> None:
        """Members 0 .. n-1. Raises UserError where a factor does not fit the model."""
        # Old stacks go first: two populations at once could exceed memory.
        self._targets = {}
        with torch.no_grad():
            self._targets = build_stacks(self.model, adapters)

    def start(self) -> TorchSession:
        """A new, empty session."""
        return TorchSession(self)

    def row_bytes(self, tokens: int) -> int:
        """Cache memory of one row of this many tokens, in bytes."""
        return tokens * sum(s.token_bytes for s in self.layers if s is not None)

    def route(self, members: Sequence[int]) -> Routing | None:
        """The layout of a batch whose rows belong to these members."""
        return Routing.of(members, self.device)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Evaluation mode (no dropout), put back as it was."""
        training = [module for module in self._modules if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def _last_token_head(self) -> Iterator[None]:
        """Let the output head see the last token alone, made contiguous.

        The slice h[:, -1:] of a prefill is not contiguous, and a bf16 product on such an input
        takes seconds on the CPU instead of milliseconds.
        """
        head = self._head
        inner, before = head.forward, head.__dict__.get("forward")

        def forward(x: Tensor) -> Any:
            return inner(x[:, -1:].contiguous() if x.dim() == 3 else x)

        head.__dict__["forward"] = forward
        try:
            yield
        finally:
            if before is None:
                head.__dict__.pop("forward")
            else:
                head.__dict__["forward"] = before

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        cache: Any,
        routing: Routing | None,
    ) -> Tensor:
        """Logits (rows, vocabulary) of the last column.

        tokens, positions: (rows, queries). mask: (rows, columns) bool, False on padding.
        """
        arguments: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        if "position_ids" in self._parameters:
            arguments["position_ids"] = positions
        with ExitStack() as swaps:
            swaps.enter_context(torch.inference_mode())
            swaps.enter_context(self._quiet())
            swaps.enter_context(swapped_attention(self._configs))
            swaps.enter_context(patched(self._targets, routing))
            swaps.enter_context(self._last_token_head())
            logits: Tensor = self.model(**arguments).logits
            return logits[:, -1]
