"""mlx-lm's adapter directories: adapters.safetensors and its own adapter_config.json.

mlx-lm computes y = W x + scale * (x lora_a) lora_b with lora_a (in, r), lora_b (r, out): the
transposes of PEFT's A and B, and scale = alpha / r. It names modules by `keys`, paths inside a
decoder layer, applied to the last `num_layers` layers (-1: all); a module of those that the file
has no tensors for keeps lora_b = 0 and changes nothing. https://github.com/ml-explore/mlx-lm
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import save_file

from loralab.adapters.files import checked, plain_number, read_config, read_tensors
from loralab.adapters.interop.peft import Reading
from loralab.adapters.state import AdapterState
from loralab.errors import UserError

_IN_LAYER = re.compile(r"model\.layers\.(\d{1,5})\.(.+)")
_HEAD = "lm_head"


def write_mlx(state: AdapterState, directory: Path, layers: int | None = None) -> None:
    """Write an adapter for mlx-lm into a directory, exact to the bit.

    layers: decoder layers of the base, if known: then only the last ones, from the first that is
    adapted, become LoRA layers in mlx-lm; else all do.

    Raises:
        UserError: a module is not called as in mlx-lm (model.layers.N.*, lm_head).
    """
    keys, first = set(), None
    for module in state.factors:
        inside = _IN_LAYER.fullmatch(module)
        if inside is None and module != _HEAD:
            raise UserError(
                f"{module}: mlx-lm calls this architecture's modules otherwise; expected "
                "model.layers.N.* or lm_head"
            )
        keys.add(module if inside is None else inside[2])
        if inside is not None:
            first = min(int(inside[1]), int(inside[1]) if first is None else first)
    # 0 would mean all layers: one that gets no adapter costs nothing to name.
    last = 1 if layers is None or first is None else max(1, layers - first)
    count = -1 if layers is None else last
    config = {
        "fine_tune_type": "lora",
        "num_layers": count,
        "lora_parameters": {
            "rank": state.rank,
            "scale": state.scaling,
            "dropout": state.extra.get("lora_dropout", 0.0),
            "keys": sorted(keys),
        },
        "model": state.base,
    }
    tensors = {}
    for module, (a, b) in state.factors.items():
        tensors[f"{module}.lora_a"] = a.detach().cpu().t().contiguous()
        tensors[f"{module}.lora_b"] = b.detach().cpu().t().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapters.safetensors", metadata={"format": "mlx"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_mlx(directory: Path) -> Reading:
    """Read an adapter of mlx-lm. Raises UserError if it is DoRA, whole layers, or damaged."""
    config = read_config(directory)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UserError(f"{directory}: fine_tune_type is {kind!r}; expected 'lora'")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or "scale" not in parameters:
        raise UserError(f"{directory}: lora_parameters has no scale; expected mlx-lm's config")
    scaling = plain_number(parameters["scale"], "lora_parameters.scale")
    dropout = plain_number(parameters.get("dropout") or 0.0, "lora_parameters.dropout")
    tensors = read_tensors(directory / "adapters.safetensors")
    factors = {}
    for key, a in tensors.items():
        module, dot, part = key.rpartition(".")
        if part not in {"lora_a", "lora_b"} or not dot or module.endswith("embed_tokens"):
            raise UserError(f"{directory}: tensor {key!r} is no factor of a linear module's LoRA")
        if f"{module}.lora_a" not in tensors or f"{module}.lora_b" not in tensors:
            raise UserError(f"{directory}: {module} has only one of lora_a and lora_b")
        if part == "lora_a":
            b = tensors[f"{module}.lora_b"]
            if a.dim() != 2 or b.dim() != 2:
                raise UserError(
                    f"{module}: lora_a is {tuple(a.shape)}; mixtures of experts and "
                    "other stacked layers cannot be expressed"
                )
            factors[module] = checked(module, a.t(), b.t())
    ranks = {f.A.shape[0] for f in factors.values()}
    if len(ranks) != 1:
        raise UserError(f"{directory}: modules have ranks {sorted(ranks)}; expected one rank")
    base = config.get("model")
    state = AdapterState(
        factors,
        scaling,
        base=base if isinstance(base, str) else None,
        extra={"lora_dropout": dropout},
    )
    return Reading(state, ())
