"""LS-LoRA and SineLoRA adapters from disk: exact changes of the weights, or the nearest LoRA.

A stranger's config is not handed to PEFT (it names modules by regular expressions and carries
options that import code): the adapter is rebuilt from the tensors' own names and the few fields
that define the function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from loralab.adapters import LSLoraConfig, SineLoraConfig
from loralab.adapters.factors import PEFT_PREFIX
from loralab.adapters.files import check_fit, checked, plain_number, read_tensors
from loralab.adapters.nonlinear import NonlinearLayer
from loralab.adapters.plain_lora import CHANGED_BASE
from loralab.adapters.state import AdapterState, Factors
from loralab.adapters.targets import linear_weights
from loralab.errors import UserError

KINDS = {"LSLORA": LSLoraConfig, "SINELORA": SineLoraConfig}

_NUMBERS = ("k_min", "k_max", "sinelora_frequency", "sinelora_scaling", "output_scale_init")
_PLAIN = ("num_knots", "interpolation_method", "boundary", "gated", "normalize", "space")
_MOST_KNOTS = 4096


@dataclass(frozen=True)
class Linearised:
    """An activation-space spline as the gain that replaces it.

    adapter: plain LoRA, each B multiplied by its module's gain. error: by module,
    ||f(z) - gain z|| / ||f(z)|| over the tokens it was fitted on.
    """

    adapter: AdapterState
    gains: Mapping[str, float]
    error: Mapping[str, float]


def open_nonlinear(directory: Path, config: Mapping[str, Any], model: Any) -> Any:
    """A PEFT model with the adapter "default" of a directory, on `model` (changed in place).

    Raises:
        UserError: the config or the tensors are damaged, or do not fit the model, or belong to a
            base that an initialisation changed.
    """
    kind = str(config.get("peft_type"))
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(field):
            raise UserError(f"{directory}: {field} with {kind} cannot be exported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise UserError(
            f"{directory}: init_lora_weights is {start[:60]!r}: the adapter belongs to a base that "
            f"this initialisation changed, and {kind} cannot be converted to the original; train "
            "it from another start"
        )
    tensors = read_tensors(directory / "adapter_model.safetensors")
    factors = _factors(tensors, directory)
    names = sorted(factors)
    check_fit(
        factors, {n: (w.shape[0], w.shape[1]) for n, w in linear_weights(model, names).items()}
    )
    rank = next(iter(factors.values())).A.shape[0]
    alpha = plain_number(config.get("lora_alpha"), "lora_alpha")
    settings = KINDS[kind](
        r=rank,
        lora_alpha=alpha,
        use_rslora=bool(config.get("use_rslora")),
        target_modules=names,
        **_function(config),
    )
    made = get_peft_model(model, settings)
    expected = get_peft_model_state_dict(made)
    for key in sorted(set(expected) ^ set(tensors)):
        raise UserError(f"{directory}: tensor {key!r} is missing or does not belong to {kind}")
    for key, tensor in expected.items():
        if tensor.shape != tensors[key].shape:
            raise UserError(
                f"{directory}: tensor {key!r} is {tuple(tensors[key].shape)}; expected "
                f"{tuple(tensor.shape)}"
            )
    set_peft_model_state_dict(made, tensors)
    return made.eval()


@torch.no_grad()
def nonlinear_deltas(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Module and dW (out, in) float32. UserError if the spline acts on activations."""
    for name, layer in _layers(model):
        yield name, layer.lora_variant["default"].delta_weight(layer, "default").float()


def acts_on_activations(model: Any) -> bool:
    """Whether no dW does the same as this adapter."""
    return not model.peft_config["default"].mergeable


@torch.no_grad()
def linearise(model: Any, sequences: Sequence[Sequence[int]]) -> Linearised:
    """Replace each module's spline f by the gain c that is nearest on real activations.

    c = sum z f(z) / sum z^2 minimises ||f(z) - c z||^2 over the values z = s B A x that the
    sequences produce; dW is then c s B A. What is lost is the curve, and f(0).
    """
    sums: dict[str, list[float]] = {}
    with ExitStack() as stack:
        for name, layer in _layers(model):
            sums[name] = [0.0, 0.0, 0.0]
            spline = layer.lora_spline["default"]
            handle = spline.register_forward_hook(_adder(sums[name]))
            stack.callback(handle.remove)
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)]))
    factors, gains, error = {}, {}, {}
    scaling = 1.0
    for name, layer in _layers(model):
        zf, zz, ff = sums[name]
        gains[name] = zf / zz if zz > 0 else 1.0
        error[name] = max(0.0, 1 - zf * zf / (zz * ff)) ** 0.5 if zz * ff > 0 else 0.0
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scaling = float(layer.scaling["default"])
        factors[name] = Factors(a.detach().float().clone(), b.detach().float() * gains[name])
    return Linearised(AdapterState(factors, scaling), gains, error)


def _adder(total: list[float]) -> Any:
    def add(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        z, f = inputs[0].double(), output.double()
        for index, value in enumerate((z * f, z * z, f * f)):
            total[index] += float(value.sum())

    return add


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        if isinstance(layer, NonlinearLayer):
            yield name.removeprefix(PEFT_PREFIX), layer


def _factors(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Factors]:
    suffix = ".lora_A.weight"
    factors = {}
    for key, a in tensors.items():
        if not key.endswith(suffix):
            continue
        b = tensors.get(key.removesuffix(suffix) + ".lora_B.weight")
        if b is None:
            raise UserError(f"{where}: {key!r} has no lora_B beside it")
        name = key.removesuffix(suffix).removeprefix(PEFT_PREFIX)
        factors[name] = checked(name, a, b)
    if len({f.A.shape[0] for f in factors.values()}) != 1:
        raise UserError(f"{where}: expected factors of one rank")
    return factors


def _function(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say which function it is; their values are checked by the config class."""
    found: dict[str, Any] = {}
    for field in _NUMBERS:
        if config.get(field) is not None:
            found[field] = plain_number(config[field], field)
    for field in _PLAIN:
        if field in config:
            found[field] = config[field]
    knots = found.get("num_knots", 2)
    if isinstance(knots, bool) or not isinstance(knots, int) or knots > _MOST_KNOTS:
        raise UserError(f"num_knots is {knots!r}; expected 2 to {_MOST_KNOTS}")
    for field in ("interpolation_method", "boundary", "normalize", "space"):
        if not isinstance(found.get(field, ""), str):
            raise UserError(f"{field} is {found[field]!r}; expected a word")
    return found
