"""Greedy completions of a model and of its base, by the engine that is exact and fast enough.

The PyTorch engine runs a model as it stands, whatever is in its layers. A Llama-like model in bf16
on the CPU is copied into the native engine instead, where its adapter is two factors and nothing
else is trained: several times as fast, and model and base still run through the same kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from loralab.adapters.extract import state_of
from loralab.adapters.state import AdapterState
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.engines.memory import available_memory
from loralab.errors import UserError
from loralab.health.still import base_of

_log = logging.getLogger(__name__)
_ADAPTER = "looked at"
_SHARE = 1 / 4
"""Of the free memory that a copy of the weights may take."""


@dataclass(frozen=True)
class Completion:
    """A greedy answer, without the prompt. token_ids: an end token included if one ended it.

    ended: by an end token. failed: why nothing more came (logits that are NaN), else None.
    """

    text: str
    token_ids: tuple[int, ...]
    ended: bool
    failed: str | None = None


def complete(
    causal: Any, tokenizer: Any, requests: Sequence[Any], max_new_tokens: int
) -> tuple[Completion, ...]:
    """Completions of a model that is held still, as it stands."""
    engine = BatchedEngine(causal, tokenizer, backend="torch")
    return _generated(engine, requests, None, max_new_tokens)


class NativeCopy:
    """A model's true base in the native engine, beside which its adapter is loaded at each look."""

    def __init__(self, model: Any, causal: Any, tokenizer: Any, state: AdapterState) -> None:
        """Raises UserError where the native engine cannot run the model or such an adapter."""
        with base_of(model), _bare(causal):
            self._engine = BatchedEngine(causal, tokenizer, backend="native")
        self._engine.load({_ADAPTER: state})

    def base(self, requests: Sequence[Any], max_new_tokens: int) -> tuple[Completion, ...]:
        """What the base answers."""
        return _generated(self._engine, requests, None, max_new_tokens)

    def adapted(
        self, state: AdapterState, requests: Sequence[Any], max_new_tokens: int
    ) -> tuple[Completion, ...]:
        """What the base answers with an adapter on the same layers as the first."""
        self._engine.load({_ADAPTER: state})
        return _generated(self._engine, requests, _ADAPTER, max_new_tokens)


def native_copy(model: Any, causal: Any, tokenizer: Any) -> NativeCopy | None:
    """A copy where the native engine runs the model, its adapter is plain LoRA, and memory is
    there."""
    weight = causal.get_input_embeddings().weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    size = sum(p.numel() * p.element_size() for p in causal.parameters())
    state = plain_adapter(model, causal)
    if state is None or size > _SHARE * available_memory():
        return None
    try:
        return NativeCopy(model, causal, tokenizer, state)
    except (UserError, AttributeError, KeyError) as error:
        _log.debug("no native copy: %s", error)
        return None


def plain_adapter(model: Any, causal: Any) -> AdapterState | None:
    """The one active adapter, where it is all by which the model differs from its true base."""
    active = getattr(model, "active_adapters", None)
    if not isinstance(active, list) or len(active) != 1 or not hasattr(model, "peft_config"):
        return None
    name = active[0]
    for module in causal.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return None
        if isinstance(module, BaseTunerLayer) and (module.merged or module.disable_adapters):
            return None
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            return None
    others = (n for n, p in causal.named_parameters() if p.requires_grad and "lora_" not in n)
    if any(others) or getattr(model.peft_config[name], "bias", "none") != "none":
        return None
    try:
        return state_of(model, name)
    except UserError:
        return None


def _generated(
    engine: BatchedEngine, requests: Sequence[Any], adapter: str | None, max_new_tokens: int
) -> tuple[Completion, ...]:
    sampling = Sampling(max_new_tokens)
    made = engine.generate([Request(request, adapter, sampling) for request in requests])
    return tuple(
        Completion(one.text, one.tokens, one.finish_reason == "stop", one.error) for one in made
    )


@contextmanager
def _bare(causal: nn.Module) -> Iterator[None]:
    """The model with its own layers where adapters stand around them."""
    places = []
    for name, layer in causal.named_modules():
        if isinstance(layer, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            places.append((causal.get_submodule(parent)._modules, leaf, layer))
    for slots, leaf, layer in places:
        slots[leaf] = layer.get_base_layer()
    try:
        yield
    finally:
        for slots, leaf, layer in places:
            slots[leaf] = layer
