"""PEFT's LoRA directories, read strictly: factors and one scaling come out, or a refusal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loralab.adapters.factors import PEFT_PREFIX, Factors
from loralab.adapters.files import (
    check_values,
    checked,
    plain_number,
    read_config,
    read_tensors,
)
from loralab.errors import UserError

CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of init_lora_weights (or what they start with) that subtract s*BA from the base weight."""

_NOT_PLAIN = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases of B",
    "modules_to_save": "whole modules trained beside the adapter",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters of bare parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA's grouped inputs",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA sampling",
}
"""Fields of LoraConfig that make the update something else than scaling * B A."""

_LONGEST_PATTERN = 300


@dataclass(frozen=True)
class PlainLora:
    """Factors by module, each of its own rank, under one scaling.

    extra: what carries over to another format. notes: in words, what differs from the files.
    """

    factors: dict[str, Factors]
    scaling: float
    base: str | None
    extra: dict[str, object]
    notes: tuple[str, ...]


def read_plain(directory: Path) -> PlainLora:
    """Read adapter_config.json and adapter_model.safetensors of a plain LoRA.

    rsLoRA (scaling alpha / sqrt(r), arXiv 2312.03732) and alpha_pattern are brought to one scaling.

    Raises:
        UserError: the adapter is more than W + scaling * B A, or belongs to a changed base (PiSSA
            and its like), or the files are missing or damaged.
    """
    config = read_config(directory)
    _refuse_what_is_not_plain(config, directory)
    factors = pair(read_tensors(directory / "adapter_model.safetensors"), directory)
    scalings = {module: _scaling(config, module, f.A.shape[0]) for module, f in factors.items()}
    made, scaling, notes = one_scaling(factors, scalings)
    return PlainLora(made, scaling, _text(config, "base_model_name_or_path"), _kept(config), notes)


def pair(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Factors]:
    """Factors by module from PEFT's tensor names. Raises UserError on any other tensor."""
    a_suffix, b_suffix = ".lora_A.weight", ".lora_B.weight"
    modules = dict.fromkeys(key.removesuffix(a_suffix) for key in tensors if key.endswith(a_suffix))
    known = {module + suffix for module in modules for suffix in (a_suffix, b_suffix)}
    if extra := sorted(set(tensors) - known):
        raise UserError(
            f"{where}: tensor {extra[0]!r} is no factor of a linear module's plain LoRA "
            f"({len(extra)} such); it cannot be expressed"
        )
    if not modules:
        raise UserError(f"{where}: holds no LoRA factors")
    factors = {}
    for module in modules:
        if module + b_suffix not in tensors:
            raise UserError(f"{where}: {module} has lora_A but no lora_B")
        name = module.removeprefix(PEFT_PREFIX)
        factors[name] = checked(name, tensors[module + a_suffix], tensors[module + b_suffix])
    return factors


def one_scaling(
    factors: Mapping[str, Factors], scalings: Mapping[str, float]
) -> tuple[dict[str, Factors], float, tuple[str, ...]]:
    """One scaling for all modules, that of most; the others' ratio goes into B, in float32.

    Returns factors, scaling, and a note where something was folded. Raises UserError.
    """
    counted = Counter(scaling for scaling in scalings.values() if scaling != 0)
    if not counted:
        raise UserError("the adapter's scaling is 0: it changes nothing; expected lora_alpha > 0")
    [(scaling, _)] = counted.most_common(1)
    made, folded = {}, 0
    for module, (a, b) in factors.items():
        ratio = scalings[module] / scaling
        if ratio != 1:
            a, b, folded = a.float(), b.float() * ratio, folded + 1
            check_values(b, f"{module}: B times {ratio:g}, which its scaling folds in,")
        made[module] = Factors(a, b)
    if not folded:
        return made, scaling, ()
    note = (
        f"changed: the scaling of {folded} of {len(made)} modules is folded into B (float32), "
        f"one scaling {scaling:g} for all"
    )
    return made, scaling, (note,)


def _refuse_what_is_not_plain(config: Mapping[str, Any], where: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{where}: adapter type {kind!r} is not plain LoRA; see --approximate")
    for field, meaning in _NOT_PLAIN.items():
        if config.get(field):
            raise UserError(
                f"{where}: {field} is {_brief(config[field])}: {meaning} cannot be expressed as "
                "plain LoRA factors; merge it with PEFT's merge_and_unload instead"
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{where}: bias is {_brief(config['bias'])}: trained biases cannot be expressed; "
            'expected "none"'
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        if start.lower() == "loftq":
            mend = (
                "the base's weights were replaced by others; if the base it is for is the one that "
                'was saved beside it, set "init_lora_weights": true'
            )
        else:
            mend = (
                "convert it first with "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...), or save "
                "loralab.adapters.extract.state_of(model) where it was trained"
            )
        raise UserError(
            f"{where}: init_lora_weights is {_brief(start)}: the adapter belongs to a base that "
            f"this initialisation changed, not to the original; {mend}"
        )


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    expected = _for_module(config, "rank_pattern", "r", module)
    if expected != rank:
        raise UserError(f"{module}: the config says rank {expected:g}, its tensors {rank}")
    alpha = _for_module(config, "alpha_pattern", "lora_alpha", module)
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _for_module(config: Mapping[str, Any], patterns: str, default: str, module: str) -> float:
    """The value of the first pattern that matches a module's name, as PEFT picks it."""
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise UserError(f"{patterns} is {_brief(table)}; expected a table of module names")
    for key, value in table.items():
        if _matches(key, module, patterns):
            return plain_number(value, f"{patterns}[{key!r}]")
    return plain_number(config.get(default), default)


def _matches(pattern: str, module: str, field: str) -> bool:
    """PEFT's rule. A stranger's regular expression must not be one that never ends."""
    quantifiers = len(re.findall(r"[*+?{]", pattern))
    if len(pattern) > _LONGEST_PATTERN or quantifiers > 2 or re.search(r"\)[*+?{]", pattern):
        raise UserError(f"{field}: the pattern {pattern[:60]!r} is too elaborate; write out names")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise UserError(f"{field}: {pattern[:60]!r} is no regular expression: {error}") from error


def _kept(config: Mapping[str, Any]) -> dict[str, object]:
    """What carries over to another format beside the factors."""
    dropout = config.get("lora_dropout") or 0.0
    return {"lora_dropout": plain_number(dropout, "lora_dropout")}


def _text(config: Mapping[str, Any], field: str) -> str | None:
    value = config.get(field)
    return value if isinstance(value, str) else None


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
