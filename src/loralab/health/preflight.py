"""Before a run starts: what it will need of memory, and how far its steps can go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loralab.engines.memory import available_memory

_BYTES_A_TOKEN = 34
"""Of activations a token and hidden unit of one layer keeps for the backward pass, in 16 bits
(Korthikanti et al. 2022, arXiv:2205.05198, equation 2, attention scores left out)."""
_CHECKPOINTED = 2
_LOGITS = 10
"""Bytes a token and entry of the vocabulary: logits in 16 bits, a copy in fp32, its gradient."""
_STATES: Mapping[str, int] = {"adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 1, "sgd": 0}
_ADAM = 8
_SIZED = ("adam", "adafactor", "lion")


@dataclass(frozen=True)
class Memory:
    """Bytes, reckoned. weights: of the loaded model. parts: what the run takes beside them, by what
    it is for. free: what there is now beside the loaded model; None if that was not asked."""

    weights: int
    parts: Mapping[str, int]
    free: int | None = None

    @property
    def beside_weights(self) -> int:
        """What the run takes once the model is loaded."""
        return sum(self.parts.values())

    def values(self) -> dict[str, float]:
        """`setup.memory` in GB, and `setup.memory_share` of what is free."""
        told = {"setup.memory": (self.weights + self.beside_weights) / 1e9}
        if self.free:
            told["setup.memory_share"] = self.beside_weights / self.free
        return told

    def __str__(self) -> str:
        sizes = {"weights": self.weights, **self.parts}
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
        free = "" if self.free is None else f"; {self.free / 1e9:.1f} GB are free"
        return f"memory, reckoned in GB: {parts}{free}"


def memory(
    model: Any,
    rows: int,
    tokens: int,
    learned_share: float = 1.0,
    optimizer: str = "adamw_torch",
    checkpointing: bool = False,
    fast: bool = True,
) -> Memory:
    """What a training step will take of a loaded model with its adapter attached.

    rows: in a batch. tokens: of the longest row. learned_share: of its tokens; with `fast` only
    those have logits. Reckoned from sizes, to a factor of two at best; nothing is run.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    state = _STATES.get(optimizer, _ADAM)
    training = sum(p.numel() * (p.element_size() + state) for p in trained)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    hidden = int(getattr(text, "hidden_size", 0) or getattr(text, "n_embd", 0) or 0)
    layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    in_batch = rows * tokens
    per_token = _CHECKPOINTED if checkpointing else _BYTES_A_TOKEN
    activations = in_batch * hidden * layers * per_token
    if checkpointing:
        activations += in_batch * hidden * _BYTES_A_TOKEN
    with_logits = in_batch * (learned_share if fast else 1.0)
    logits = int(with_logits * int(getattr(text, "vocab_size", 0) or 0) * _LOGITS)
    parts = {
        "gradients and optimiser": training,
        "activations": activations,
        "logits": logits,
    }
    return Memory(weight_bytes(model), parts, free_memory(next(model.parameters()).device))


def weight_bytes(model: Any) -> int:
    """Of all parameters, those that modules share once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory()


def dose(optimizer: str, lr: float, steps: int, schedule: str) -> dict[str, float]:
    """`train.dose`: the sum of the learning rate over a run, its warm-up left out of account; {} of
    an optimiser whose steps have no size of their own (SGD)."""
    if not any(kind in optimizer for kind in _SIZED):
        return {}
    return {"train.dose": lr * steps * (1.0 if schedule == "constant" else 0.5)}
