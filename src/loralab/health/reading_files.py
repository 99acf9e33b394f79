"""An adapter on disk: read with nothing believed, and put on its base as PEFT would.

What is wrong with the files themselves becomes findings, each one line; what cannot be examined at
all (pickles, options that import code, virtual tokens) is a UserError. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import loralab.adapters  # noqa: F401  makes PEFT know LS-LoRA and SineLoRA
from loralab.adapters.factors import PEFT_PREFIX
from loralab.adapters.files import read_config
from loralab.adapters.interop.mlx import read_mlx
from loralab.adapters.plain_lora import CHANGED_BASE
from loralab.adapters.targets import weight_of
from loralab.adapters.true_base import remember
from loralab.errors import UserError
from loralab.health.causes import MENDS
from loralab.health.findings import Finding

WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
ADAPTER = "default"

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npz"}
_RECOMPUTED = ("pissa", "olora")
"""Starts that PEFT takes out of W again when it loads such an adapter."""

_RUNS_CODE = ("megatron_config", "prompt_tuning_init_state_dict_path")
"""Fields of a config that import a module or unpickle a file when PEFT follows them."""

_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
_LONGEST_PATTERN = 4000
_ENDLESS = re.compile(r"\)[*+{]|[*+}]\??\.[*+]")
"""Repeated groups and neighbouring wildcards: what makes a regular expression take for ever."""


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


@dataclass(frozen=True)
class Loaded:
    """model: a PeftModel, None where it did not fit. missing, unexpected: tensors of the adapter
    that the file lacks, and of the file that are nowhere in the adapter. notes: for people."""

    model: Any | None
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    faults: tuple[Finding, ...]
    notes: tuple[str, ...] = ()


def is_adapter(path: Path) -> bool:
    """Whether a path looks like an adapter, sound or not."""
    if path.is_file():
        return path.suffix in {".safetensors", *_PICKLES}
    names = ("adapter_config.json", WEIGHTS, MLX_WEIGHTS, "adapter_model.bin", "adapters.npz")
    return any((path / name).exists() for name in names)


def read_adapter(path: Path) -> AdapterFiles:
    """Read an adapter's directory (or the directory of a .safetensors file).

    Raises:
        UserError: there is no adapter, its weights are a pickle, or its config asks for more than
            an examination should do.
    """
    if path.suffix in _PICKLES and path.is_file():
        raise _pickle(path)
    directory = path.parent if path.is_file() else path
    if not is_adapter(directory):
        raise UserError(
            f"{path}: no adapter here; expected adapter_config.json and {WEIGHTS} (PEFT) or "
            f"{MLX_WEIGHTS} (mlx-lm)"
        )
    faults: list[Finding] = []
    config = _config(directory, faults)
    is_mlx = "peft_type" not in config and (directory / MLX_WEIGHTS).exists()
    kind = "MLX" if is_mlx else str(config.get("peft_type", "LORA"))
    _refuse(directory, kind, config)
    tensors = _tensors(directory / (MLX_WEIGHTS if is_mlx else WEIGHTS), faults)
    faults += _bad_numbers(tensors)
    if kind in {"LORA", "LSLORA", "SINELORA"}:
        faults += _bad_pairs(tensors, config)
    base = config.get("model" if is_mlx else "base_model_name_or_path")
    named = base if isinstance(base, str) and base else None
    return AdapterFiles(directory, kind, config, tensors, named, tuple(faults))


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
                return Loaded(None, (), (), (_corrupt(str(error)),))
        config = _sanitised(files, directory, Path(folder))
        before = _weights(model) if files.start.startswith(_RECOMPUTED) else {}
        try:
            with _own_random_numbers(), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                loaded = _from_pretrained(model, directory, config)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            return Loaded(None, (), (), (_wrong_base(_first_line(error)),))
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


def _config(directory: Path, faults: list[Finding]) -> Mapping[str, Any]:
    if not (directory / "adapter_config.json").exists():
        faults.append(_corrupt(f"{directory}: there is no adapter_config.json beside the weights"))
        return {}
    try:
        return read_config(directory)
    except UserError as error:
        faults.append(_corrupt(str(error)))
        return {}


def _refuse(directory: Path, kind: str, config: Mapping[str, Any]) -> None:
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


def _tensors(path: Path, faults: list[Finding]) -> dict[str, Tensor]:
    if not path.is_file():
        for other in sorted(path.parent.glob("*")):
            if other.suffix in _PICKLES:
                raise _pickle(other)
        faults.append(_corrupt(f"{path}: there is no such file beside the config"))
        return {}
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        size = path.stat().st_size
        faults.append(_corrupt(f"{path}: {size} bytes, not safetensors: {_first_line(error)}"))
        return {}
    if not tensors:
        faults.append(_corrupt(f"{path}: holds no tensors"))
    return tensors


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
        yield _corrupt(f"{whole[0]} is {kind}; expected floating-point numbers")


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
            yield _corrupt(f"{module}: the config says rank {rank}, its tensors have {tall}")
            return
    for module, pair in halves.items():
        if len(pair) == 2 and not _fit(pair["A"], pair["B"]):
            shapes = f"A {tuple(pair['A'].shape)}, B {tuple(pair['B'].shape)}"
            yield _corrupt(f"{module}: {shapes}; expected (r, in) and (out, r)")
            return


def _fit(a: Tensor, b: Tensor) -> bool:
    # Convolutions have factors of four dimensions.
    return a.dim() != 2 or b.dim() != 2 or a.shape[0] == b.shape[1]


def _misfits(model: Any, files: AdapterFiles) -> Iterator[Finding]:
    """Where factors of linear modules are for another model."""
    modules = dict(model.named_modules())
    wanted = list(_linear_shapes(files))
    strangers = [name for name, _, _ in wanted if name not in modules]
    if wanted and len(strangers) == len(wanted):
        some = next((n for n, m in modules.items() if weight_of(m) is not None), "none")
        yield _wrong_base(
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
        yield _wrong_base(
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


def _pickle(path: Path) -> UserError:
    return UserError(
        f"{path}: pickled weights can run code when read and are refused; where you trust them, "
        f"save them again as {WEIGHTS}"
    )


def _corrupt(message: str) -> Finding:
    return _finding("file.corrupt", "file.corrupt", message, {})


def _wrong_base(message: str) -> Finding:
    return _finding("file.wrong_base", "file.wrong_base", message, {}, also=("file.corrupt",))


def _finding(
    rule: str,
    cause: str,
    message: str,
    numbers: Mapping[str, float],
    also: tuple[str, ...] = (),
) -> Finding:
    return Finding(rule, "fail", 0, message, dict(numbers), cause, also, MENDS[cause])


def _first_line(error: BaseException) -> str:
    lines = [x for x in str(error).splitlines() if x.strip()]
    mismatch = [x for x in lines if "size mismatch" in x]
    line = next(iter(mismatch or lines), type(error).__name__)
    return " ".join(line.split())[:300]


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """PEFT draws values for tensors before it loads them."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
