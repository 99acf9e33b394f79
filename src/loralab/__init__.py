"""Train LoRA adapters by gradient or by evolution, and tell whether they work."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {"load": "loralab.models.load", "doctor": "loralab.examine"}
"""Public names that need torch: imported when first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
