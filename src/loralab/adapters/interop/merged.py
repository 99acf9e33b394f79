"""A base model with a change of its weights folded in: a plain Transformers directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loralab.adapters.files import short
from loralab.adapters.state import AdapterState
from loralab.adapters.targets import weight_of
from loralab.errors import UserError


@dataclass(frozen=True)
class Merge:
    """What rounding to the stored dtype did to a merge.

    modules: how many were changed. no_op: share of the weights with dW != 0 whose stored value is
    the base's all the same. error: ||stored - (W + dW)||_F / ||dW||_F over those modules.
    untied: the output head had to be split from the embedding.
    """

    modules: int
    no_op: float
    error: float
    untied: bool


def lora_deltas(state: AdapterState) -> Iterator[tuple[str, Tensor]]:
    """Module and dW = scaling * B @ A (out, in), float32, one at a time."""
    for module, (a, b) in state.factors.items():
        yield module, state.scaling * (b.float() @ a.float())


def merge(model: Any, deltas: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Merge:
    """Add dW (out, in) to each named linear module in float32, then round the model to `dtype`.

    The model must be float32 and hold values of `dtype`, or the base's own rounding would be
    counted. If the output head is adapted and shares its weight with the embedding, it gets its
    own first.

    Raises:
        UserError: a module is not linear in this model, does not fit, or overflows `dtype`.
    """
    was_tied = bool(model.config.tie_word_embeddings)
    modules = dict(model.named_modules())
    count, touched, kept = 0, 0, 0
    lost = size = 0.0
    for module, delta in deltas:
        _untie(model, modules.get(module))
        weight = _weight(modules.get(module), module)
        if weight.shape != delta.shape:
            raise UserError(
                f"{module}: the adapter is for {tuple(delta.shape)}, the base has "
                f"{tuple(weight.shape)}; wrong --base?"
            )
        exact = weight + delta.to(weight.device)
        stored = exact.to(dtype)
        if not bool(torch.isfinite(stored).all()):
            raise UserError(f"{module}: the merged weight overflows {short(dtype)}")
        moved = delta != 0
        touched += int(moved.sum())
        kept += int((moved & (stored == weight.to(dtype))).sum())
        lost += float((stored.float() - exact).norm()) ** 2
        size += float(delta.norm()) ** 2
        weight.copy_(stored)
        count += 1
    model.to(dtype)
    return Merge(
        count,
        kept / touched if touched else 0.0,
        (lost / size) ** 0.5 if size else 0.0,
        was_tied and not model.config.tie_word_embeddings,
    )


def write_merged(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write config, tokenizer and model.safetensors (tied tensors once) into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    first = next(model.parameters())
    model.config.dtype = first.dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    _repeat_rope(directory / "config.json")
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _repeat_rope(path: Path) -> None:
    """Write the rotary settings under their older names too.

    Transformers 5 has them in `rope_parameters` alone. mlx-lm 0.32 reads `rope_theta`, and takes
    10000 without a word if there is none: the model then answers, but not as itself.
    """
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return
    config.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config.setdefault("rope_scaling", scaling)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _untie(model: Any, module: Any) -> None:
    head = model.get_output_embeddings()
    if module is None or module is not head or not model.config.tie_word_embeddings:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _weight(module: nn.Module | None, name: str) -> Tensor:
    weight = weight_of(module)
    if weight is None:
        raise UserError(f"{name}: the base model has no such linear module; wrong --base?")
    return weight
