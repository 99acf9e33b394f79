"""Dropout of the base model, which a loss against a reference has to do without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_base_dropout(model: nn.Module) -> Iterator[None]:
    """Within it no module drops anything but an adapter's own dropout, which its config asked for.

    With it a model would differ from itself as the reference: no ln 2, no KL of 0 at the start.
    """
    kept: list[tuple[nn.Module, str, float]] = []
    for name, module in model.named_modules():
        if ".lora_dropout." in name:
            continue
        attribute = "p" if isinstance(module, nn.Dropout) else "attention_dropout"
        value = getattr(module, attribute, None)
        if isinstance(value, float):
            kept.append((module, attribute, value))
            setattr(module, attribute, 0.0)
    try:
        yield
    finally:
        for module, attribute, value in kept:
            setattr(module, attribute, value)
