"""An adapter as plain tensors: what engines run, evolution changes and disks hold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors.torch import save_file

from loralab import durable
from loralab.adapters.factors import PEFT_PREFIX, Factors
from loralab.adapters.plain_lora import read_plain

__all__ = ["AdapterState", "Factors"]


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

        PEFT's own scaling (alpha / r) gives ours back; modules of another rank than most are in
        rank_pattern and alpha_pattern.
        """
        if not self.factors:
            raise ValueError("cannot save: the adapter has no factors")
        directory.mkdir(parents=True, exist_ok=True)
        ranks = {name: f.A.shape[0] for name, f in self.factors.items()}
        [(rank, _)] = Counter(ranks.values()).most_common(1)
        others = {name: r for name, r in sorted(ranks.items()) if r != rank}
        tensors = {}
        for name, (a, b) in self.factors.items():
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": rank,
            "lora_alpha": self.scaling * rank,
            "rank_pattern": others,
            "alpha_pattern": {name: self.scaling * r for name, r in others.items()},
            "target_modules": sorted(self.factors),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            **self.extra,
        }
        weights = directory / "adapter_model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        durable.make_readable(weights)
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @staticmethod
    def load(directory: Path) -> AdapterState:
        """Read a plain LoRA adapter from a directory of PEFT's.

        rsLoRA, rank_pattern and alpha_pattern are followed; ranks stay as they are, and what
        scalings differ by is folded into B.

        Raises:
            UserError: the adapter is more than W + scaling * B A, or belongs to a base that an
                initialisation changed, or its files are missing or damaged.
        """
        read = read_plain(directory)
        return AdapterState(read.factors, read.scaling, base=read.base, extra=read.extra)
