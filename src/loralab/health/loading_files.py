"""An adapter that was read, put on its base as PEFT would: what fits, and what is left over."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import loralab.adapters  # noqa: F401  makes PEFT know LS-LoRA and SineLoRA
from loralab.adapters.factors import PEFT_PREFIX
from loralab.adapters.interop.mlx import read_mlx
from loralab.adapters.plain_lora import CHANGED_BASE
from loralab.adapters.targets import weight_of
from loralab.adapters.true_base import remember
from loralab.errors import UserError
from loralab.health.findings import Finding
from loralab.health.reading_files import AdapterFiles, corrupt, first_line, wrong_base

ADAPTER = "default"

_RECOMPUTED = ("pissa", "olora")
"""Starts that PEFT takes out of W again when it loads such an adapter."""


@dataclass(frozen=True)
class Loaded:
    """model: a PeftModel, None where it did not fit. missing, unexpected: tensors of the adapter
    that the file lacks, and of the file that are nowhere in the adapter. notes: for people."""

    model: Any | None
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    faults: tuple[Finding, ...]
    notes: tuple[str, ...] = ()


def load_adapter(model: Any, files: AdapterFiles) -> Loaded:
    """Put the adapter on a base model in memory, which is changed.

    A start that PEFT takes out of W again (PiSSA, OLoRA) is remembered, so that the true base can
    still be had. Where the file and the model do not fit, the result has no model.
    """
    wrong = tuple(_misfits(model, files))
    if wrong:
        return Loaded(None, (), (), wrong)
    with TemporaryDirectory() as folder:
        directory, notes = files.directory, _notes(files)
        if files.kind == "MLX":
            directory = Path(folder)
            try:
                read_mlx(files.directory).state.save(directory)
            except UserError as error:
                return Loaded(None, (), (), (corrupt(str(error)),))
        try:
            config = _sanitised(files, directory, Path(folder))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            named = f"{type(error).__name__} {first_line(error)}"
            return Loaded(None, (), (), (corrupt(f"PEFT cannot read the config: {named}"),))
        before = _weights(model) if files.start.startswith(_RECOMPUTED) else {}
        try:
            with _own_random_numbers(), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                loaded = _from_pretrained(model, directory, config)
        except (TypeError, AttributeError) as error:
            line = f"PEFT cannot put it on the base: {type(error).__name__} {first_line(error)}"
            return Loaded(None, (), (), (corrupt(line),))
        except (ValueError, RuntimeError, KeyError) as error:
            return Loaded(None, (), (), (wrong_base(first_line(error)),))
    _remember(loaded, before)
    missing, unexpected = _keys(loaded, files, [str(one.message) for one in said])
    return Loaded(loaded.eval(), missing, unexpected, (), notes)


def _from_pretrained(model: Any, directory: Path, config: Any) -> Any:
    from peft import PeftModel

    device = next(model.parameters()).device
    return PeftModel.from_pretrained(
        model, str(directory), adapter_name=ADAPTER, config=config, torch_device=str(device)
    )


def _sanitised(files: AdapterFiles, directory: Path, folder: Path) -> Any:
    """PEFT's config object, made from the file's fields; starts that only their own preparation
    can make are left out, since the file holds what came of them."""
    from peft import PeftConfig

    fields = dict(files.config)
    if files.kind == "MLX":
        return PeftConfig.from_pretrained(str(directory))
    start = files.start
    if start.startswith(CHANGED_BASE) and not start.startswith(_RECOMPUTED):
        fields["init_lora_weights"] = True
    clean = folder / "config"
    clean.mkdir()
    (clean / "adapter_config.json").write_text(json.dumps(fields))
    return PeftConfig.from_pretrained(str(clean))


def _misfits(model: Any, files: AdapterFiles) -> Iterator[Finding]:
    """Where factors of linear modules are for another model."""
    modules = dict(model.named_modules())
    wanted = list(_linear_shapes(files))
    strangers = [name for name, _, _ in wanted if name not in modules]
    if wanted and len(strangers) == len(wanted):
        some = next((n for n, m in modules.items() if weight_of(m) is not None), "none")
        yield wrong_base(
            f"none of its {len(wanted)} modules is in this base: it is for {strangers[0]}, the "
            f"base has {some}"
        )
        return
    off = []
    for name, wide, high in wanted:
        layer = modules.get(name)
        found = weight_of(layer)
        if found is None:
            continue
        features = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
        shape = features if all(features) else tuple(found.shape)
        if (high or shape[0], wide or shape[1]) != shape:
            off.append((name, (high or shape[0], wide or shape[1]), shape))
    if off:
        name, given, shape = off[0]
        yield wrong_base(
            f"{name}: the adapter is for {given}, the base has {shape} ({len(off)} of "
            f"{len(wanted)} modules do not fit)"
        )


def _linear_shapes(files: AdapterFiles) -> Iterator[tuple[str, int | None, int | None]]:
    """Module, in features, out features of each pair of factors in the file."""
    if files.kind not in {"LORA", "LSLORA", "SINELORA", "MLX"}:
        return
    for key, tensor in files.tensors.items():
        if tensor.dim() != 2:
            continue
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            b = files.tensors.get(f"{module}.lora_B.weight")
            high = None if b is None or b.dim() != 2 else b.shape[0]
            yield module.removeprefix(PEFT_PREFIX), tensor.shape[1], high
        elif key.endswith(".lora_a"):
            module = key.removesuffix(".lora_a")
            b = files.tensors.get(f"{module}.lora_b")
            high = None if b is None or b.dim() != 2 else b.shape[1]
            yield module, tensor.shape[0], high


def _weights(model: Any) -> dict[str, Tensor]:
    """Every linear weight as it is stored, by reference: PEFT assigns new ones when it splits."""
    return {
        name: module.weight.data
        for name, module in model.named_modules()
        if weight_of(module) is not None
    }


def _remember(loaded: Any, before: Mapping[str, Tensor]) -> None:
    for name, layer in loaded.named_modules():
        old = before.get(name.removeprefix(PEFT_PREFIX))
        if old is None or not hasattr(layer, "get_base_layer"):
            continue
        parameter = layer.get_base_layer().weight
        now = parameter.data
        if now.data_ptr() != old.data_ptr():
            parameter.data = old
            remember(layer, ADAPTER)
            parameter.data = now


def _keys(
    loaded: Any, files: AdapterFiles, said: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tensors that the file lacks and has too many. PEFT renames some keys of old files, so what
    it says of missing ones decides."""
    from peft import get_peft_model_state_dict

    if files.kind == "MLX":
        return (), ()
    expected: set[str] = set()
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
    given = set(files.tensors)
    own = {name for name, _ in loaded.get_base_model().named_parameters()}
    plain = {key for key in given if key.removeprefix(PEFT_PREFIX) in own}
    absent = sorted(expected - given)
    if any("missing adapter keys" in line for line in said):
        missing = tuple(absent or ["(PEFT names them otherwise)"])
    elif absent:
        return (), ()
    else:
        missing = ()
    return missing, tuple(sorted(given - expected - plain)) if expected else ()


def _notes(files: AdapterFiles) -> tuple[str, ...]:
    start = files.start
    if start.startswith("pissa_niter"):
        return (
            f"init_lora_weights is {start!r}, whose split of W is random: PEFT cannot make the "
            "same when it loads the adapter; convert it to plain LoRA",
        )
    if start.startswith(CHANGED_BASE) and not start.startswith(_RECOMPUTED):
        return (
            f"init_lora_weights is {start!r}: it belongs to the base as that start left it, which "
            "has to be saved beside it and given as --base",
        )
    return ()


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """PEFT draws values for tensors before it loads them."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
