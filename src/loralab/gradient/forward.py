"""The model under an adapter, and its `forward`, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any


def causal_of(model: Any) -> Any:
    """The model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def forward_kept(*models: Any) -> Iterator[None]:
    """Take out again what is put over `forward` within it (TRL and Accelerate do), or calls would
    pile up."""
    before = [model.__dict__.get("forward") for model in models]
    try:
        yield
    finally:
        for model, forward in zip(models, before, strict=True):
            if forward is None:
                model.__dict__.pop("forward", None)
            else:
                model.__dict__["forward"] = forward


@contextmanager
def forward_as(model: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it calls of the model run forward(model, ...)."""
    with forward_kept(model):
        model.__dict__["forward"] = MethodType(forward, model)
        yield
