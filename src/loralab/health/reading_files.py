"""An adapter on disk, read with nothing believed.

What is wrong with the files themselves becomes findings, each one line; what is refused altogether
(`refused`) is a UserError. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import loralab.adapters  # noqa: F401  makes PEFT know LS-LoRA and SineLoRA
from loralab.adapters.files import read_config
from loralab.errors import UserError
from loralab.health.causes import MENDS
from loralab.health.findings import Finding
from loralab.health.refused import PICKLES, pickled, refuse

WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"

_FIELDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "r": ((int,), "a whole number"),
    "lora_alpha": ((int, float), "a number"),
    "lora_dropout": ((int, float), "a number"),
    "target_modules": ((str, list), "a pattern or a list of names"),
}
"""Fields of a config by what they may hold."""


@dataclass(frozen=True)
class AdapterFiles:
    """kind: PEFT's type, or "MLX". base: the name of the model it says it is for.

    faults: what is wrong with the files alone; with a "fail" among them it is not worth loading.
    tensors: by the names in the file, {} if it could not be read.
    """

    directory: Path
    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    base: str | None
    faults: tuple[Finding, ...]

    @property
    def readable(self) -> bool:
        """Whether it can be put on a base at all."""
        return not any(fault.severity == "fail" for fault in self.faults)

    @property
    def start(self) -> str:
        """Its init_lora_weights in lower case, "" if it names none."""
        value = self.config.get("init_lora_weights")
        return value.lower() if isinstance(value, str) else ""


def is_adapter(path: Path) -> bool:
    """Whether a path looks like an adapter, sound or not."""
    if path.is_file():
        return path.suffix in {".safetensors", *PICKLES}
    names = ("adapter_config.json", WEIGHTS, MLX_WEIGHTS, "adapter_model.bin", "adapters.npz")
    return any((path / name).exists() for name in names)


def read_adapter(path: Path) -> AdapterFiles:
    """Read an adapter's directory (or the directory of a .safetensors file).

    Raises:
        UserError: there is no adapter, its weights are a pickle, or its config asks for more than
            an examination should do.
    """
    if path.suffix in PICKLES and path.is_file():
        raise pickled(path, WEIGHTS)
    directory = path.parent if path.is_file() else path
    if not is_adapter(directory):
        raise UserError(
            f"{path}: no adapter here; expected adapter_config.json and {WEIGHTS} (PEFT) or "
            f"{MLX_WEIGHTS} (mlx-lm)"
        )
    faults: list[Finding] = []
    config = _config(directory, faults)
    is_mlx = "peft_type" not in config and (directory / MLX_WEIGHTS).exists()
    named = config.get("peft_type", "LORA")
    kind = "MLX" if is_mlx else named if isinstance(named, str) else f"{named!r}"
    refuse(directory, kind, config)
    tensors = _tensors(directory / (MLX_WEIGHTS if is_mlx else WEIGHTS), faults)
    faults += [*_bad_fields(kind, config), *_bad_numbers(tensors)]
    if kind in {"LORA", "LSLORA", "SINELORA"}:
        faults += _bad_pairs(tensors, config)
    base = config.get("model" if is_mlx else "base_model_name_or_path")
    base_name = base if isinstance(base, str) and base else None
    return AdapterFiles(directory, kind, config, tensors, base_name, tuple(faults))


def _config(directory: Path, faults: list[Finding]) -> Mapping[str, Any]:
    if not (directory / "adapter_config.json").exists():
        faults.append(corrupt(f"{directory}: there is no adapter_config.json beside the weights"))
        return {}
    try:
        return read_config(directory)
    except UserError as error:
        faults.append(corrupt(str(error)))
        return {}


def _tensors(path: Path, faults: list[Finding]) -> dict[str, Tensor]:
    if not path.is_file():
        for other in sorted(path.parent.glob("*")):
            if other.suffix in PICKLES:
                raise pickled(other, WEIGHTS)
        faults.append(corrupt(f"{path}: there is no such file beside the config"))
        return {}
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        size = path.stat().st_size
        faults.append(corrupt(f"{path}: {size} bytes, not safetensors: {first_line(error)}"))
        return {}
    if not tensors:
        faults.append(corrupt(f"{path}: holds no tensors"))
    return tensors


def _bad_fields(kind: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    """What PEFT would stumble over with an error that tells nothing."""
    if kind != "MLX" and kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        yield corrupt(f"peft_type is {kind[:60]!r}, which this PEFT does not know")
    for name, (types, expected) in _FIELDS.items():
        value = config.get(name)
        if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
            yield corrupt(f"{name} is {str(value)[:60]!r}; expected {expected}")


def _bad_numbers(tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    bad = [name for name, x in tensors.items() if not bool(torch.isfinite(x).all())]
    if bad:
        entries = sum(int((~torch.isfinite(tensors[name])).sum()) for name in bad)
        yield _finding(
            "weights.nan",
            "numbers.nan",
            f"{len(bad)} of {len(tensors)} tensors hold NaN or infinity ({entries} entries), first "
            f"{bad[0]}",
            {"weights.nan": float(len(bad)), "tensors": float(len(tensors))},
            also=("file.corrupt", "lr.too_high"),
        )
    whole = [name for name, x in tensors.items() if not x.is_floating_point()]
    if whole:
        kind = str(tensors[whole[0]].dtype).removeprefix("torch.")
        yield corrupt(f"{whole[0]} is {kind}; expected floating-point numbers")


def _bad_pairs(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Factors of linear modules that do not fit each other, or one of which is not there."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for half in ("A", "B"):
            suffix = f".lora_{half}.weight"
            if key.endswith(suffix):
                halves.setdefault(key.removesuffix(suffix), {})[half] = tensor
    alone = [module for module, pair in halves.items() if len(pair) < 2]
    if alone:
        lost = "B" if "A" in halves[alone[0]] else "A"
        yield _finding(
            "parity.keys_missing",
            "save.keys_dropped",
            f"{len(alone)} of {len(halves)} modules have one factor only, first {alone[0]}, which "
            f"lacks lora_{lost}",
            {"parity.keys_missing": float(len(alone)), "modules": float(len(halves))},
            also=("file.corrupt",),
        )
    rank = config.get("r")
    for module, pair in halves.items():
        if not isinstance(rank, int) or config.get("rank_pattern"):
            break
        tall = next(pair[half].shape[0 if half == "A" else -1] for half in pair)
        if all(half.dim() == 2 for half in pair.values()) and tall != rank:
            yield corrupt(f"{module}: the config says rank {rank}, its tensors have {tall}")
            return
    for module, pair in halves.items():
        if len(pair) == 2 and not _fit(pair["A"], pair["B"]):
            shapes = f"A {tuple(pair['A'].shape)}, B {tuple(pair['B'].shape)}"
            yield corrupt(f"{module}: {shapes}; expected (r, in) and (out, r)")
            return


def _fit(a: Tensor, b: Tensor) -> bool:
    # Convolutions have factors of four dimensions.
    return a.dim() != 2 or b.dim() != 2 or a.shape[0] == b.shape[1]


def corrupt(message: str) -> Finding:
    return _finding("file.corrupt", "file.corrupt", message, {})


def wrong_base(message: str) -> Finding:
    return _finding("file.wrong_base", "file.wrong_base", message, {}, also=("file.corrupt",))


def _finding(
    rule: str,
    cause: str,
    message: str,
    numbers: Mapping[str, float],
    also: tuple[str, ...] = (),
) -> Finding:
    return Finding(rule, "fail", 0, message, dict(numbers), cause, also, MENDS[cause])


def first_line(error: BaseException) -> str:
    """Of an error, the line that tells most; 300 characters at most."""
    lines = [x for x in str(error).splitlines() if x.strip()]
    mismatch = [x for x in lines if "size mismatch" in x]
    line = next(iter(mismatch or lines), type(error).__name__)
    return " ".join(line.split())[:300]
