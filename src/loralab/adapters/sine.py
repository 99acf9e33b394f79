"""SineLoRA: the sine of the low-rank product, of full rank at LoRA's cost in parameters.

    dW = (alpha / r) sin(w B A) / g        elementwise; h = W0 x + dW dropout(x)

Source: Ji et al. 2025, "Efficient Learning With Sine-Activated Low-rank Matrices", ICLR, arXiv
2403.19243. The frequency w and the gain g are fixed. The authors' PEFT implementation
(huggingface/peft pull request 2457) takes g = sqrt(in_features) by default, and so does this.
The default frequency, 200, rests on no source: choose it for your task.

PEFT type "SINELORA". To load one, `import loralab.adapters` first. It can be merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from loralab.adapters.nonlinear import (
    NonlinearConfig,
    NonlinearLayer,
    NonlinearModel,
    NonlinearVariant,
    product,
)
from loralab.adapters.peft_types import AdapterType, register
from loralab.errors import UserError


@dataclass
class SineLoraConfig(NonlinearConfig):
    """LoRA's configuration (r, lora_alpha, target_modules, ...), the frequency and the gain.

    Raises:
        UserError: an option is out of range, or belongs to plain LoRA only.
    """

    kind = AdapterType.SINELORA

    sinelora_frequency: float = field(default=200.0, metadata={"help": "w, in the sine."})
    sinelora_scaling: float | None = field(
        default=None, metadata={"help": "g, what the sine is divided by; None: sqrt(in_features)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sinelora_frequency", "sinelora_scaling"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"SineLoraConfig: {name} is {value}; expected a positive number")

    def variant(self) -> NonlinearVariant:
        return SineVariant(self.sinelora_frequency, self.sinelora_scaling)


class SineVariant(NonlinearVariant):
    """The sine on the update of the weights."""

    def __init__(self, frequency: float, gain: float | None) -> None:
        self.frequency, self.gain = frequency, gain

    def delta_weight(self, layer: LoraLayer, adapter: str) -> Tensor:
        gain = sqrt(layer.in_features) if self.gain is None else self.gain
        outer: float = layer.scaling[adapter] / gain
        return torch.sin(self.frequency * product(layer, adapter)) * outer


class SineLayer(NonlinearLayer):
    """A LoRA layer whose adapters may be sine-activated."""


class SineLoraModel(NonlinearModel):
    """PEFT's tuner for SineLoRA."""

    layer_mixin = SineLayer


register(AdapterType.SINELORA, SineLoraConfig, SineLoraModel)
