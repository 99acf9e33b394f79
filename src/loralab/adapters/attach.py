"""From a config's `adapter` section to a PEFT model, initialised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loralab.adapters.targets import layer_index, linear_weights
from loralab.config import AdapterConfig
from loralab.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel, config: AdapterConfig, seed: int = 0) -> PeftModel:
    """The model with a new adapter named "default", started with A random and B = 0.

    The base's weights are frozen. Other starts: `loralab.adapters.initialize` on the result.

    Raises:
        UserError: a module or layer is not in the model.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return get_peft_model(model, peft_config(model, config))


def peft_config(model: PreTrainedModel, config: AdapterConfig) -> LoraConfig:
    """The PEFT config of an `adapter` section: LoraConfig, LSLoraConfig or SineLoraConfig."""
    from peft import LoraConfig

    from loralab.adapters import LSLoraConfig, SineLoraConfig

    kinds: dict[str, Any] = {"lora": LoraConfig, "lslora": LSLoraConfig, "sinelora": SineLoraConfig}
    try:
        return kinds[config.type](
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=_targets(model, config),
            task_type=_task_type(model),
            **config.type_options,
        )
    except TypeError as error:
        raise UserError(f"adapter.type_options: {error}") from error
    except ValueError as error:
        raise UserError(f"adapter: {error}") from error


def _task_type(model: PreTrainedModel) -> str | None:
    """PEFT's word for what the model is for; a classifier's head is then trained and saved too."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if hasattr(model, "lm_head") else None


def targeted_weights(model: PreTrainedModel, config: AdapterConfig) -> dict[str, Tensor]:
    """Weights (out, in) of the modules an `adapter` section is for, by name.

    Raises:
        UserError: a module or layer is not in the model.
    """
    named = linear_weights(model, config.target_modules)
    if _every_layer(config):
        return named
    present = sorted({layer for name in named if (layer := layer_index(name)) is not None})
    layers = _layers(present, config)
    return {name: weight for name, weight in named.items() if layer_index(name) in layers}


def _every_layer(config: AdapterConfig) -> bool:
    return config.num_layers in (None, -1) and config.layers_to_transform is None


def _targets(model: PreTrainedModel, config: AdapterConfig) -> str | list[str]:
    """Names for PEFT: as they were given, or in full when only some layers are wanted."""
    named = targeted_weights(model, config)
    given = config.target_modules
    if not _every_layer(config):
        return list(named)
    return given if isinstance(given, str) else list(given)


def _layers(present: Sequence[int], config: AdapterConfig) -> set[int]:
    if config.num_layers is not None:
        if not 0 < config.num_layers <= len(present):
            raise UserError(
                f"adapter.num_layers is {config.num_layers}; expected 1 to {len(present)}, or -1"
            )
        return set(present[-config.num_layers :])
    wanted = set(config.layers_to_transform or ())
    if missing := sorted(wanted - set(present)):
        raise UserError(f"adapter.layers_to_transform: no layer {missing[0]} among {len(present)}")
    return wanted
