"""Reading adapters that strangers wrote: JSON and safetensors only, every shape checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from loralab.adapters.factors import Factors
from loralab.errors import UserError

_FLOATS = {torch.float32, torch.float16, torch.bfloat16}
_LARGEST_CONFIG = 1 << 22
"""Bytes. A real adapter_config.json has a few thousand; one with a pattern a module, 100,000."""

_LONGEST_NAME = 512


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json as a dict. Raises UserError if it is absent or not a JSON object."""
    path = directory / "adapter_config.json"
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise UserError(f"{path}: {path.stat().st_size} bytes; expected a small JSON file")
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds a {type(config).__name__}; expected a JSON object")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: float32, float16 or bfloat16, all finite.

    Raises UserError on anything else; pickles beside it are never opened.
    """
    if not path.is_file():
        for other in sorted(path.parent.glob("*")):
            if other.suffix in {".bin", ".npz", ".pt", ".pth", ".pkl", ".ckpt"}:
                raise UserError(
                    f"{other}: pickled or packed weights can run code when read and are refused; "
                    f"convert them to {path.name} where you trust them"
                )
        raise UserError(f"{path}: no such file; expected the adapter's weights there")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from error
    for name, tensor in tensors.items():
        check_values(tensor, f"{path}: tensor {name!r}")
    return tensors


def check_values(tensor: Tensor, what: str) -> None:
    """Raise UserError unless the tensor is float32, float16 or bfloat16 and finite."""
    if tensor.dtype not in _FLOATS:
        raise UserError(f"{what} is {short(tensor.dtype)}; expected float32, float16 or bfloat16")
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{what} holds NaN or infinity; the adapter is broken")


def checked(module: str, a: Tensor, b: Tensor) -> Factors:
    """A (r, in) and B (out, r) as Factors. Raises UserError if they do not fit each other."""
    if len(module) > _LONGEST_NAME:
        raise UserError(f"a module's name has {len(module)} characters; the adapter is damaged")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise UserError(
            f"{module}: A is {tuple(a.shape)} and B {tuple(b.shape)}; expected (r, in), (out, r)"
        )
    return Factors(a.contiguous(), b.contiguous())


def check_fit(factors: Mapping[str, Factors], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise UserError unless every module is a linear one of the base, of these (out, in)."""
    for module, (a, b) in factors.items():
        if module not in shapes:
            raise UserError(f"{module}: the base model has no such linear module; wrong --base?")
        given = (b.shape[0], a.shape[1])
        if given != shapes[module]:
            raise UserError(
                f"{module}: the adapter is for {given}, the base has {shapes[module]}; "
                "wrong --base?"
            )


def plain_number(value: object, what: str) -> float:
    """A finite number from a config. Raises UserError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{what} is {value!r}; expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if number - number != 0:
        raise UserError(f"{what} is {value!r}; expected a finite number")
    return number


def short(dtype: torch.dtype) -> str:
    """The name without "torch."."""
    return str(dtype).removeprefix("torch.")
