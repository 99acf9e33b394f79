"""What may differ between a run's config and the one that it goes on under."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MOVABLE = frozenset(
    {
        *(f"cluster.{key}" for key in ("address", "actors", "gpus_per_actor")),
        *(f"cluster.{key}" for key in ("restarts", "start_seconds")),
        *(f"engine.sglang.{key}" for key in ("url", "key_variable", "admin_key_variable")),
        *(f"engine.sglang.{key}" for key in ("command", "folder", "batch", "workers")),
        *(f"engine.sglang.{key}" for key in ("timeout", "start_timeout", "retries")),
        "scoring.workers",
    }
)
"""Keys that say where and by how many a run is done, not what it computes: they may change from one
session of a run to the next."""
NULL_SECTIONS: Mapping[str, Mapping[str, Any]] = {"engine.sglang": {"args": [], "max_loras": 8}}
"""Sections that may be null, with the defaults of those of their keys that are not MOVABLE."""


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two configs differ, each with both values; those in MOVABLE may. A key
    that is absent is one that is null: a run goes on under a program with more options."""
    if prefix in MOVABLE:
        return []
    if prefix in NULL_SECTIONS and (old is None) != (new is None):
        old, new = old or NULL_SECTIONS[prefix], new or NULL_SECTIONS[prefix]
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{prefix}.{key}" if prefix else str(key)
            lines += differences(old.get(key), new.get(key), inner)
        return lines
    return [] if old == new else [f"{prefix} was {json.dumps(old)}, is {json.dumps(new)}"]
