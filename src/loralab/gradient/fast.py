"""`patch(model)`: a faster training step for the LoRA layers of a PEFT model.

    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    loralab.gradient.fast.patch(model)

Each layer that can run exactly gets a forward of one autograd operation (`lora_function.py`, and
`spline_function.py` for LS-LoRA);
parameters, names and files stay PEFT's. Whatever a call needs beyond that (several adapters,
merged or disabled ones, adapters by row, hooks on an inner layer) goes to PEFT's own forward,
call by call, so a patched model may be changed in any way that PEFT allows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.spline import LoraSpline, SplineLayer, SplineVariant
from loralab.gradient.lora_function import lora_linear
from loralab.gradient.spline_function import ls_lora_linear

log = logging.getLogger(__name__)

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Report:
    """Which LoRA layers run the fast operation, by module name.

    taken: those that do, as the model now stands.
    left: those that PEFT's own forward runs, each with the reason.
    """

    taken: tuple[str, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        total = len(self.taken) + len(self.left)
        reasons = Counter(self.left.values())
        rest = "; ".join(f"{count} left to PEFT: {why}" for why, count in reasons.items())
        return f"fast step on {len(self.taken)} of {total} LoRA layers" + (f"; {rest}" * bool(rest))


def patch(model: nn.Module) -> nn.Module:
    """Give the LoRA layers of a PEFT model the fast forward, in place; returns the model.

    Outputs and gradients equal PEFT's up to rounding (in bf16 they are nearer to fp32's). What
    was left to PEFT, and why, is logged and is in `report(model)`.
    """
    for _, layer in _layers(model):
        if _fast_forward_of(layer) is not None and "forward" not in vars(layer):
            layer.forward = MethodType(_fast_forward_of(layer), layer)  # type: ignore[arg-type]
    log.info("%s", report(model))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give every layer PEFT's forward back, in place; returns the model.

    Raises RuntimeError where someone has wrapped the fast forward since (accelerate's hooks do):
    take that off first.
    """
    for name, layer in _layers(model):
        if _is_patched(layer):
            del layer.forward
        elif "forward" in vars(layer) and _wraps_fast_forward(vars(layer)):
            raise RuntimeError(f"{name}: its forward was wrapped after patch(); unwrap it first")
    return model


def report(model: nn.Module) -> Report:
    """What a call would do now in each LoRA layer of the model."""
    taken, left = [], {}
    for name, layer in _layers(model):
        why = _obstacle(layer) if _is_patched(layer) else _unpatched(layer)
        if why is None:
            taken.append(name)
        else:
            left[name] = why
    return Report(tuple(taken), left)


def _layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))


def _fast_forward_of(layer: LoraLayer) -> Forward | None:
    kind = type(layer)
    known = kind is PeftLinear or kind.__bases__ == (SplineLayer, PeftLinear)
    return lora_forward if known else None


def _is_patched(layer: LoraLayer) -> bool:
    forward = vars(layer).get("forward")
    return isinstance(forward, MethodType) and forward.__func__ is _fast_forward_of(layer)


def _wraps_fast_forward(attributes: Mapping[str, Any]) -> bool:
    inner = attributes.get("_old_forward")
    return isinstance(inner, MethodType) and inner.__func__ is lora_forward


def _unpatched(layer: LoraLayer) -> str:
    if _fast_forward_of(layer) is None:
        kind = type(layer)
        return f"no fast operation for {kind.__module__}.{kind.__qualname__}"
    return "its forward was replaced" if "forward" in vars(layer) else "not patched"


def lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PEFT's `Linear.forward` of a layer: the fast operation where it is exact."""
    beyond = args or any(value is not None for value in kwargs.values())
    if beyond or _obstacle(layer) is not None or _unfit(x, layer.base_layer.weight):
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    name = _active(layer)[0]
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    given = (
        x,
        base.weight.t() if type(base) is Conv1D else base.weight,
        base.bias,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
    )
    probability = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    if name in layer.lora_variant:
        return ls_lora_linear(*given, layer.lora_spline[name], probability)
    return lora_linear(*given, probability)


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _obstacle(layer: Any) -> str | None:
    """Why PEFT's own forward must run this layer, as it now stands; None: nothing does."""
    if layer.disable_adapters:
        return "adapters disabled"
    if layer.merged:
        return "merged"
    active = _active(layer)
    if len(active) != 1:
        return f"{len(active)} active adapters"
    name = active[0]
    if name in layer.lora_variant:
        variant = layer.lora_variant[name]
        if type(variant) is not SplineVariant:
            return f"variant {type(variant).__name__}"
        if (why := _spline_obstacle(variant, layer.lora_spline[name])) is not None:
            return why
    base = layer.base_layer
    if not (_plain(base, nn.Linear) or _plain(base, Conv1D)):
        return f"base layer is a {type(base).__name__} with hooks or of an unknown kind"
    if type(base.weight) not in (nn.Parameter, Tensor) or not base.weight.is_floating_point():
        return f"base weight is a {type(base.weight).__name__} of {base.weight.dtype}"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "base layer is trained"
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if not (_plain(down, nn.Linear) and _plain(up, nn.Linear)):
        return "lora_A or lora_B has hooks or is not a plain linear layer"
    if down.bias is not None or up.bias is not None:
        return "lora_bias"
    if not (_plain(dropout, nn.Identity) or (_plain(dropout, nn.Dropout) and dropout.p < 1)):
        return "dropout has hooks or is not nn.Dropout"
    return None


def _spline_obstacle(variant: SplineVariant, spline: LoraSpline) -> str | None:
    if variant.space != "activation":
        return f"spline on {variant.space}s"
    if spline.interpolation_method != "piecewise" or spline.normalize != "none":
        return f"spline is {spline.interpolation_method}, normalize {spline.normalize}"
    if spline.outside is not None:
        return "counts of the spline's inputs asked for"
    return None if _plain(spline, LoraSpline) else "spline has hooks or is of an unknown kind"


def _plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says and no more."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _unfit(x: Tensor, weight: Tensor) -> bool:
    if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return True
    if torch.is_autocast_enabled(x.device.type):
        return not x.is_floating_point()
    return x.dtype != weight.dtype
