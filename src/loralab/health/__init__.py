"""Whether an adapter is broken, before, during and after training, and why.

Probes measure (`probes`), rules judge (`rules`), a guard watches a training (`guard`) and a doctor
examines what lies on disk (`doctor`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {"GuardCallback": "loralab.health.guard"}
"""Names that need torch; the report reads findings without it."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
