"""The words PEFT and MLX use for an adapter's settings, put into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PEFT = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
MLX = {"keys": "target_modules"}
DEFAULT_RANK = 8


def in_our_words(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adapter settings with every other dialect's key renamed; unknown keys stay as they are.

    MLX's `scale` is alpha / rank, so it becomes alpha. `init: x` is short for `init: {name: x}`.

    Raises:
        ValueError: one setting is given twice, in two dialects.
    """
    ours: dict[str, Any] = {}
    said: dict[str, str] = {}
    for key, value in values.items():
        word = {**PEFT, **MLX, "scale": "alpha"}.get(key, key)
        if word in said:
            raise ValueError(f"{said[word]} or {key}, which are the same setting, not both")
        said[word], ours[word] = key, value
    scale = values.get("scale")
    if isinstance(scale, int | float) and not isinstance(scale, bool):
        rank = ours.get("rank", DEFAULT_RANK)
        ours["alpha"] = float(scale) * rank if isinstance(rank, int) else scale
    if isinstance(ours.get("init"), str):
        ours["init"] = {"name": ours["init"]}
    return ours
