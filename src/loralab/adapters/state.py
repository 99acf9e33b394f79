"""An adapter as plain tensors: what engines run, evolution changes and disks hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Factors(NamedTuple):
    """The two factors of one module's update, dW = scaling * B @ A (out, in)."""

    A: Tensor
    """(r, in)"""
    B: Tensor
    """(out, r)"""


@dataclass(frozen=True)
class AdapterState:
    """LoRA factors by module name (as in `model.named_modules()`), and one scaling.

    Members of a population share a tensor where they do not differ (evolution on `B` shares every
    `A`); engines use the identity of the tensor object to see it.
    """

    factors: Mapping[str, Factors]
    scaling: float
    kind: str = "lora"
    base: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank among the modules; 0 without any."""
        return max((f.A.shape[0] for f in self.factors.values()), default=0)

    def digest(self) -> str:
        """Hex digest of every factor's name, shape and fp32 bytes, order-independent."""
        h = blake2b(digest_size=16)
        h.update(f"{self.kind}|{self.scaling!r}".encode())
        for name in sorted(self.factors):
            for part, tensor in zip("AB", self.factors[name], strict=True):
                h.update(f"{name}.{part}|{tuple(tensor.shape)}".encode())
                h.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return h.hexdigest()

    def save(self, directory: Path) -> None:
        """Write PEFT's format: adapter_config.json and adapter_model.safetensors.

        Rank and alpha are uniform here, so PEFT's own scaling (alpha / r) gives ours back.
        """
        directory.mkdir(parents=True, exist_ok=True)
        ranks = {f.A.shape[0] for f in self.factors.values()}
        if len(ranks) != 1:
            raise ValueError(f"cannot save: modules have different ranks {sorted(ranks)}")
        rank = ranks.pop()
        tensors = {}
        for name, (a, b) in self.factors.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().cpu().contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": rank,
            "lora_alpha": self.scaling * rank,
            "target_modules": sorted(self.factors),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            **self.extra,
        }
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @staticmethod
    def load(directory: Path) -> AdapterState:
        """Read a PEFT LoRA adapter from a directory. Raises ValueError on any other kind."""
        config = json.loads((directory / "adapter_config.json").read_text())
        if config.get("peft_type") != "LORA":
            raise ValueError(
                f"{directory}: adapter type {config.get('peft_type')!r} is not plain LoRA"
            )
        tensors = load_file(directory / "adapter_model.safetensors")
        suffix_a, prefix = ".lora_A.weight", "base_model.model."
        factors = {}
        for key, a in tensors.items():
            if key.endswith(suffix_a):
                name = key.removesuffix(suffix_a)
                factors[name.removeprefix(prefix)] = Factors(a, tensors[f"{name}.lora_B.weight"])
        rank = config["r"]
        alpha = config["lora_alpha"]
        scaling = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        return AdapterState(factors, scaling, base=config.get("base_model_name_or_path"))
