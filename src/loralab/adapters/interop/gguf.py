"""LoRA adapters as GGUF files, for llama.cpp.

llama.cpp adds (alpha / r) * B A x to W x. Tensors are named as the base's in GGUF with .lora_a
(r, in) and .lora_b (out, r) behind; general.type is "adapter", adapter.type "lora",
adapter.lora.alpha a float32. Llama's conversion to GGUF reorders the rows of q_proj and k_proj
inside each head (rotary halves become interleaved pairs); the rows of B there follow, A does not.
https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from loralab.adapters.files import check_fit, check_values, checked
from loralab.adapters.interop.base import BaseShape
from loralab.adapters.interop.peft import Reading, uniform
from loralab.adapters.state import AdapterState, Factors
from loralab.errors import UserError
from loralab.models.gguf import Reader

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""model_type of Transformers -> architecture in GGUF, where only Llama's reorders rows."""

_ALPHA, _TYPE = "adapter.lora.alpha", "adapter.type"


def write_gguf(state: AdapterState, path: Path, base: BaseShape) -> None:
    """Write an adapter for llama.cpp: float32, which holds every value of the 16-bit formats.

    Raises:
        UserError: the architecture is not among those known here, or the adapter does not fit it.
    """
    architecture = _architecture(base)
    check_fit(state.factors, base.shapes)
    names = _names(base, architecture)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type("adapter")
    writer.add_string(_TYPE, "lora")
    writer.add_float32(_ALPHA, state.scaling * state.rank)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for module, (a, b) in state.factors.items():
        if module not in names:
            raise UserError(f"{module}: llama.cpp has no tensor for it in {base.config.model_type}")
        b = reorder(b, heads) if (heads := _heads(module, base)) else b
        for suffix, tensor in (("lora_a", a), ("lora_b", b)):
            data = tensor.detach().cpu().float().contiguous().numpy()
            writer.add_tensor(f"{names[module]}.{suffix}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, base: BaseShape) -> Reading:
    """Read a GGUF LoRA adapter. Raises UserError if it is something else or does not fit."""
    architecture = _architecture(base)
    try:
        reader = Reader(path)
        kind, form = _field(reader, "general.type"), _field(reader, _TYPE)
        name, alpha = _field(reader, "general.architecture"), _field(reader, _ALPHA)
        tensors = {str(t.name): _tensor(t) for t in reader.tensors}
    except UserError:
        raise
    except Exception as error:  # the reader raises all sorts on damaged files
        raise UserError(f"{path}: cannot be read as GGUF: {error}") from error
    if kind != "adapter" or form != "lora":
        raise UserError(f"{path}: general.type {kind!r}, {_TYPE} {form!r}; expected adapter, lora")
    if name != gguf.MODEL_ARCH_NAMES[architecture]:
        raise UserError(f"{path}: is for {name!r}, the base is {base.config.model_type!r}")
    modules = {tensor: module for module, tensor in _names(base, architecture).items()}
    factors, scalings = {}, {}
    for key, tensor in tensors.items():
        target, _, part = key.rpartition(".")
        if part not in {"lora_a", "lora_b"} or target not in modules:
            raise UserError(f"{path}: tensor {key!r} is no factor of a linear module of the base")
        if part == "lora_b":
            continue
        if f"{target}.lora_b" not in tensors:
            raise UserError(f"{path}: {target} has lora_a but no lora_b")
        module = modules[target]
        made = checked(module, tensor, tensors[f"{target}.lora_b"])
        check_fit({module: made}, base.shapes)
        if heads := _heads(module, base):
            made = Factors(made.A, restore(made.B, heads))
        factors[module] = made
        # Without an alpha llama.cpp takes the factors as they are.
        scalings[module] = alpha / made.A.shape[0] if alpha else 1.0
    if len(tensors) != 2 * len(factors) or not factors:
        raise UserError(f"{path}: {len(tensors)} tensors, {len(factors)} pairs of lora_a, lora_b")
    return uniform(factors, scalings, None, {})


def reorder(b: Tensor, heads: int) -> Tensor:
    """Rows (out, r) as Llama's GGUF has them: (2, d/2) of each head becomes (d/2, 2)."""
    size = b.shape[0] // heads
    return b.reshape(heads, 2, size // 2, -1).transpose(1, 2).reshape(b.shape)


def restore(b: Tensor, heads: int) -> Tensor:
    """Undo `reorder`."""
    size = b.shape[0] // heads
    return b.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(b.shape).contiguous()


def _heads(module: str, base: BaseShape) -> int:
    """Heads of a module whose rows Llama's GGUF reorders; 0 for others."""
    if _ARCHITECTURES[base.config.model_type] != gguf.MODEL_ARCH.LLAMA:
        return 0
    match module.rpartition(".")[2]:
        case "q_proj":
            return int(base.config.num_attention_heads)
        case "k_proj":
            return int(base.config.num_key_value_heads)
        case _:
            return 0


def _architecture(base: BaseShape) -> Any:
    kind = base.config.model_type
    if kind not in _ARCHITECTURES:
        raise UserError(
            f"base model of type {kind!r}: its names and layout in GGUF are not known here; "
            f"expected {', '.join(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[kind]


def _names(base: BaseShape, architecture: Any) -> Mapping[str, str]:
    """GGUF's tensor name ("blk.0.attn_q.weight") by module name."""
    table = gguf.get_tensor_name_map(architecture, base.layers)
    named = {m: table.get_name(f"{m}.weight", try_suffixes=(".weight",)) for m in base.shapes}
    return {module: name for module, name in named.items() if name is not None}


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _tensor(entry: Any) -> Tensor:
    kinds = gguf.GGMLQuantizationType
    if entry.tensor_type not in {kinds.F32, kinds.F16, kinds.BF16}:
        raise UserError(
            f"tensor {entry.name!r} is {entry.tensor_type.name}; expected F32, F16 or BF16"
        )
    if entry.tensor_type == kinds.BF16:
        tensor = torch.from_numpy(gguf.dequantize(entry.data, kinds.BF16).astype(np.float32))
    else:
        tensor = torch.from_numpy(np.array(entry.data))
    check_values(tensor, f"tensor {entry.name!r}")
    return tensor
