"""A PEFT model as initialisations see it: the sites of one adapter, and data to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import get_bnb_param_type
from torch import Tensor, nn

from loralab.adapters.dense import dense_weight
from loralab.adapters.factors import PEFT_PREFIX
from loralab.adapters.inits.calibration import Moments, measure
from loralab.adapters.true_base import remember
from loralab.errors import UserError


@dataclass(frozen=True)
class Site:
    """One adapted linear module. name: as in the base model's `named_modules()`."""

    name: str
    layer: Any
    adapter: str

    @property
    def rank(self) -> int:
        return int(self.layer.r[self.adapter])

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter])

    @property
    def A(self) -> Tensor:
        """(r, in)"""
        return self.layer.lora_A[self.adapter].weight  # type: ignore[no-any-return]

    @property
    def B(self) -> Tensor:
        """(out, r)"""
        return self.layer.lora_B[self.adapter].weight  # type: ignore[no-any-return]

    @property
    def quantized(self) -> str | None:
        """ "4bit" or "8bit" for bitsandbytes' weights."""
        return get_bnb_param_type(self.layer.get_base_layer().weight) or None

    def weight(self) -> Tensor:
        """The base's weight as it is now, (out, in), fp32, dequantised: a copy."""
        return dense_weight(self.layer.get_base_layer())

    def set(self, a: Tensor, b: Tensor) -> None:
        """Write the factors, keeping the parameters' own dtype and device."""
        with torch.no_grad():
            for parameter, value in ((self.A, a), (self.B, b)):
                if tuple(value.shape) != tuple(parameter.shape):
                    raise ValueError(
                        f"{self.name}: factor {tuple(value.shape)}, not {tuple(parameter.shape)}"
                    )
                parameter.copy_(value)

    def correct(self, correction: Tensor) -> None:
        """Add (out, in) to the base's weight, which is remembered as it was."""
        base = self.layer.get_base_layer()
        remember(self.layer, self.adapter)
        with torch.no_grad():
            changed = self.weight() + correction.to(base.weight.device)
            base.weight.copy_(changed.t() if self.layer.fan_in_fan_out else changed)


@dataclass
class Scene:
    """Everything an initialisation may use. Statistics are gathered when first asked for.

    texts: calibration text; the last quarter is held out of every fit.
    """

    model: PeftModel
    adapter: str
    seed: int
    tokenizer: Any = None
    texts: Sequence[str] = ()
    max_tokens: int = 512
    asked_by: str = "this initialisation"

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every module of the adapter, in the model's order.

        Raises:
            UserError: the model has no such adapter, or a module that is not linear.
        """
        sites = []
        for path, module in self.model.named_modules():
            if not isinstance(module, LoraLayer) or self.adapter not in module.r:
                continue
            name = path.removeprefix(PEFT_PREFIX)
            if self.adapter not in module.lora_A or not hasattr(module, "fan_in_fan_out"):
                kind = type(module.get_base_layer()).__name__
                raise UserError(
                    f"{self.asked_by}: {name} is {kind}; initialisations are for linear modules, "
                    "leave it out of target_modules"
                )
            sites.append(Site(name, module, self.adapter))
        if not sites:
            known = ", ".join(self.model.peft_config)
            raise UserError(f"the model has no LoRA adapter {self.adapter!r}; it has {known}")
        return tuple(sites)

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that depend on the seed and the module's name, not on the order."""
        digest = blake2b(f"{self.seed}|{name}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    @cached_property
    def token_rows(self) -> tuple[Tensor, ...]:
        """Each calibration text as ids (1, T), at most max_tokens of them."""
        if self.tokenizer is None or not self.texts:
            raise UserError(
                f"{self.asked_by} looks at text: give it a tokenizer and texts (in a config, "
                "adapter.init.options.texts is a list or a file with one text a line)"
            )
        device = next(self.model.parameters()).device
        rows = []
        for text in self.texts:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_tokens]
            if len(ids) > 1:
                rows.append(torch.tensor([ids], device=device))
        if len(rows) < 2:
            raise UserError(
                f"{self.asked_by} needs two texts or more of two tokens or more; it got {len(rows)}"
            )
        return tuple(rows)

    @property
    def fitting_rows(self) -> tuple[Tensor, ...]:
        return self.token_rows[: -self._held_out_count]

    @property
    def held_out_rows(self) -> tuple[Tensor, ...]:
        return self.token_rows[-self._held_out_count :]

    @property
    def _held_out_count(self) -> int:
        return max(1, len(self.token_rows) // 4)

    @cached_property
    def moments(self) -> Moments:
        """E[x x^T] of each site's input on the fitting text, with the adapter off."""
        return self._measured(self.fitting_rows)

    @cached_property
    def held_out_moments(self) -> Moments:
        return self._measured(self.held_out_rows)

    def _measured(self, rows: Sequence[Tensor]) -> Moments:
        layers: Mapping[str, nn.Module] = {site.name: site.layer for site in self.sites}
        with self.model.disable_adapter():
            return measure(self.model, layers, rows)
