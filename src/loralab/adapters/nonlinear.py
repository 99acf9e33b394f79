"""What adapters with a function of B A share: how PEFT builds, refuses and merges them.

PEFT's LoRA layers hand the forward pass of an adapter to its `LoraVariant` if it has one. The
layers here give every adapter of ours such a variant; all the rest (several adapters, mixed
batches, quantised bases, saving) stays PEFT's.
"""

from __future__ import annotations

import copy
import sys
from abc import abstractmethod
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from loralab.adapters.peft_types import AdapterType
from loralab.errors import UserError

_REFUSED = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "use_qalora",
    "velora_config",
    "alora_invocation_tokens",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "megatron_config",
)


class NonlinearVariant(LoraVariant):  # type: ignore[misc]
    """How one adapter of one layer computes its output."""

    mergeable = True

    def supports_lora_conversion(self) -> bool:
        return self.mergeable

    @abstractmethod
    def delta_weight(self, layer: LoraLayer, adapter: str) -> Tensor:
        """dW (out, in) in at least fp32. Raises UserError if there is none."""

    def init(self, module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """Create what the adapter owns beside A and B."""

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """result + dropout(x) dW^T: the same function as after a merge (dropout aside)."""
        change = self.delta_weight(module, active_adapter)
        dropped: Tensor = module.lora_dropout[active_adapter](x)
        return result + linear(dropped, change.to(dropped.dtype))

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return self._shifted(module, active_adapter, orig_weight, 1)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = self._shifted(module, active_adapter, orig_weight.data, 1)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return self._shifted(module, active_adapter, orig_weight.data, -1)

    def _shifted(self, layer: LoraLayer, adapter: str, weight: Tensor, sign: int) -> Tensor:
        """weight + sign * dW, rounded once."""
        with torch.no_grad():
            change: Tensor = transpose(self.delta_weight(layer, adapter), layer.fan_in_fan_out)
            return (weight.to(change.dtype) + sign * change.to(weight.device)).to(weight.dtype)


def product(layer: LoraLayer, adapter: str) -> Tensor:
    """B A (out, in) in at least fp32, also under autocast: a function of it may be steep."""
    a: Tensor = layer.lora_A[adapter].weight
    b: Tensor = layer.lora_B[adapter].weight
    work = torch.promote_types(b.dtype, torch.float32)
    with torch.autocast(device_type=b.device.type, enabled=False):
        return b.to(work) @ a.to(work)


@dataclass
class NonlinearConfig(LoraConfig):  # type: ignore[misc]
    """LoRA's configuration without the options that mean nothing for a nonlinear adapter."""

    kind = AdapterType.LSLORA

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind
        for option in _REFUSED:
            if getattr(self, option):
                raise UserError(
                    f"{type(self).__name__}: {option} is {getattr(self, option)!r}, which works "
                    "with plain LoRA only; leave it out"
                )
        if self.init_lora_weights == "mica":
            raise UserError(
                f"{type(self).__name__}: init_lora_weights is 'mica', which works with plain LoRA "
                "only; choose another"
            )

    @property
    def mergeable(self) -> bool:
        """Whether there is a dW that does the same."""
        return True

    def variant(self) -> NonlinearVariant:
        """What computes an adapter of this configuration."""
        raise NotImplementedError


class NonlinearLayer(LoraLayer):  # type: ignore[misc]
    """Mixin before one of PEFT's LoRA layers: our configurations get their own variant."""

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        if isinstance(config, NonlinearConfig):
            return config.variant()
        variant: LoraVariant | None = super().resolve_lora_variant(config=config, **kwargs)
        return variant

    def get_delta_weight(self, adapter: str) -> Tensor:
        variant = self.lora_variant.get(adapter)
        change: Tensor
        if isinstance(variant, NonlinearVariant):
            change = transpose(variant.delta_weight(self, adapter), self.fan_in_fan_out)
            return change.to(self.lora_B[adapter].weight.dtype)
        change = super().get_delta_weight(adapter)
        return change


class NonlinearModel(LoraModel):  # type: ignore[misc]
    """Base of the PEFT tuners: which layers an adapter can go on, and what it refuses."""

    layer_mixin: type[NonlinearLayer]

    def _create_and_replace(
        self,
        lora_config: NonlinearConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, BaseTunerLayer) and not isinstance(target, NonlinearLayer):
            raise UserError(
                f"{current_key}: already holds an adapter of another type "
                f"({type(target).__name__}); unload it, or merge it, before adding "
                f"{lora_config.kind.value}"
            )
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
        )

    @classmethod
    def _create_new_module(
        cls, lora_config: NonlinearConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        config = copy.copy(lora_config)
        config.fan_in_fan_out = isinstance(target, Conv1D)
        kind = _peft_layer(target)
        if kind is None:
            raise UserError(
                f"{kwargs.get('target_name')}: {lora_config.kind.value} cannot adapt a "
                f"{type(target).__name__}; expected Linear, Conv1D of Transformers, or Linear4bit "
                "or Linear8bitLt of bitsandbytes: change target_modules"
            )
        if kind is LoraLinear:
            kwargs["is_target_conv_1d_layer"] = config.fan_in_fan_out
        made: nn.Module = _layer_class(cls.layer_mixin, kind)(
            target, adapter_name, config=config, **kwargs
        )
        return made

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._refuse_unmergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._refuse_unmergeable(adapter_names)
        unloaded: nn.Module = super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )
        return unloaded

    def _refuse_unmergeable(self, adapter_names: list[str] | None) -> None:
        """Before any layer is touched: a half-merged model would be worse than the error."""
        for name in adapter_names or self.active_adapters:
            config = self.peft_config.get(name)
            if isinstance(config, NonlinearConfig) and not config.mergeable:
                raise UserError(not_mergeable(name))

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of factors is not the sum of nonlinear updates."""
        raise UserError(
            f"add_weighted_adapter: {', '.join(adapters)} are nonlinear in B A, so no weights on "
            "their factors give the sum of their updates; activate them together with set_adapter"
        )

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Refused: it rests on the update being linear in B A."""
        raise UserError(
            "path_initial_model_for_weight_conversion: works with plain LoRA only; save without it "
            "and load on the same base weights"
        )


def not_mergeable(adapter: str) -> str:
    """The message for a merge that cannot be."""
    return (
        f"adapter {adapter!r} cannot be merged: its spline acts on activations, so no change of "
        'the weights does the same; keep it unmerged, or train with space="weight"'
    )


def _peft_layer(base: nn.Module) -> type[Any] | None:
    """PEFT's LoRA layer for a module, None if no adapter of ours can go on it."""
    # A model holds layers of bitsandbytes only if it has been imported.
    bnb = sys.modules.get("bitsandbytes")
    if bnb is not None:
        for name in ("Linear8bitLt", "Linear4bit"):
            if isinstance(base, getattr(bnb.nn, name)):
                found: type[Any] = getattr(import_module("peft.tuners.lora.bnb"), name)
                return found
    # MultiheadAttention reads the weight of its output projection and never calls it.
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return None
    return LoraLinear if isinstance(base, nn.Linear | Conv1D) else None


def _layer_class(mixin: type[Any], kind: type[Any]) -> type[Any]:
    """The LoRA layer with the mixin before it; one class for each pair."""
    if (mixin, kind) not in _classes:
        body = {"__module__": mixin.__module__}
        _classes[mixin, kind] = type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), body)
    return _classes[mixin, kind]


_classes: dict[tuple[type[Any], type[Any]], type[Any]] = {}
