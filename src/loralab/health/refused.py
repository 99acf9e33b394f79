"""What an examination does not follow: pickles, and configs that ask for more than an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.errors import UserError

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npz"}
"""Ends of the names of files that can run code when they are read."""

_RUNS_CODE = ("megatron_config", "prompt_tuning_init_state_dict_path")
"""Fields of a config that import a module or unpickle a file when PEFT follows them."""

_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
_LONGEST_PATTERN = 4000
_ENDLESS = re.compile(r"\)[*+{]|[*+}]\??\.[*+]")
"""Repeated groups and neighbouring wildcards: what makes a regular expression take for ever."""


def refuse(directory: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Raises UserError for configs that would make PEFT do more than build an adapter."""
    for name in _RUNS_CODE:
        if config.get(name):
            raise UserError(
                f"{directory}: {name} is set: following it would run code or unpickle a file; "
                "take it out of adapter_config.json where you trust the rest"
            )
    if kind in {"XLORA", "POLY"}:
        raise UserError(f"{directory}: {kind} adapters load others from elsewhere; not examined")
    if kind == "MLX" and config.get("fine_tune_type", "lora") != "lora":
        raise UserError(
            f"{directory}: fine_tune_type is {config['fine_tune_type']!r}; of mlx-lm's adapters "
            "only 'lora' can be examined"
        )
    patterns = [str(config[name]) for name in _PATTERNS if isinstance(config.get(name), str)]
    for name in ("rank_pattern", "alpha_pattern"):
        table = config.get(name)
        patterns += list(table) if isinstance(table, dict) else []
    for pattern in patterns:
        if len(pattern) > _LONGEST_PATTERN or _ENDLESS.search(pattern):
            raise UserError(
                f"{directory}: the pattern {pattern[:60]!r} may take for ever to match; write "
                "out the modules' names"
            )


def pickled(path: Path, instead: str) -> UserError:
    """Why such a file is not read. instead: the name it should have."""
    return UserError(
        f"{path}: pickled weights can run code when read and are refused; where you trust them, "
        f"save them again as {instead}"
    )
