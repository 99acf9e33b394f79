"""The model an adapter was given, where its initialisation changed the weights under it.

PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ move a part of W into the adapter, so `disable_adapter()`
gives W - s B0 A0 and not the base: DPO's reference, every KL and every comparison would be against
another model. What the initialisations here change they remember: the weight as it was, on the
CPU, and the factors that were taken out of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

_SLOT = "_loralab_memory"


@dataclass
class Memory:
    """weight: W as it was, in its own layout and dtype, on the CPU.

    A0 (r, in), B0 (out, r): the start of the adapter for which it was changed, or None while that
    start is not known, or when what was taken out is not s B0 A0.
    """

    adapter: str
    weight: Tensor
    A0: Tensor | None = None
    B0: Tensor | None = None


def remember(layer: Any, adapter: str) -> None:
    """Keep a layer's weight before the first change; later changes keep the first memory."""
    if getattr(layer, _SLOT, None) is None:
        weight = layer.get_base_layer().weight.detach()
        # A plain attribute: not in the state dict, not moved with the model.
        object.__setattr__(layer, _SLOT, Memory(adapter, weight.to("cpu", copy=True)))


def memory_of(layer: Any) -> Memory | None:
    """What a layer's weight was, or None if it never changed."""
    return getattr(layer, _SLOT, None)


def restore(model: nn.Module) -> None:
    """Give every changed weight back as it was, for good, and forget it."""
    for layer in model.modules():
        memory = memory_of(layer)
        if memory is not None:
            parameter = cast("Any", layer).get_base_layer().weight
            parameter.data = memory.weight.to(parameter.device)
            object.__setattr__(layer, _SLOT, None)


def owner(model: nn.Module) -> str | None:
    """The adapter whose start changed the weights, or None if they are the base's."""
    return next((m.adapter for x in model.modules() if (m := memory_of(x)) is not None), None)


def base_changed(model: nn.Module) -> bool:
    """Whether a disabled adapter is not the base model any more."""
    return owner(model) is not None


def base_replaced(model: nn.Module) -> bool:
    """Whether weights changed by other than a start that was taken out of them: then no adapter
    alone gives the model from its base."""
    return any(m.A0 is None for x in model.modules() if (m := memory_of(x)) is not None)


@contextmanager
def true_base(model: Any) -> Iterator[None]:
    """The base model to the bit: adapters off, and every changed weight as it was before.

    Use it wherever PEFT's `disable_adapter()` is meant to give the reference.
    """
    changed = [m for m in model.modules() if memory_of(m) is not None]
    kept = []
    with model.disable_adapter():
        try:
            for layer in changed:
                parameter = layer.get_base_layer().weight
                kept.append((parameter, parameter.data))
                memory = memory_of(layer)
                assert memory is not None
                parameter.data = memory.weight.to(parameter.device)
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data
