"""The least time a training step can take: its arithmetic at the speed of bf16 matrix products."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.targets import linear_weights
from loralab.bench.table import Section
from loralab.bench.timing import Lap, Timed


def lora_flops(model: Any, rank: int, lengths: Sequence[int], learned: int) -> float:
    """Floating-point operations of forward and backward with adapters on every linear.

        2 t (2 P + 3 R) + 6 L h d sum n (n + 1) + 4 V w l

    t: tokens, in sequences of n each. P: weights of the linears, frozen: products with x and, on
    the way back, with the gradient. R: weights of the adapters, which need a third product. L h d:
    layers by the width of all heads; a query sees the keys before it alone, in two products forward
    and four back. V w: weights of the head, run on the l learned tokens. Norms, rotations and
    softmax count as nothing.
    """
    weights = linear_weights(model).values()
    frozen = sum(weight.numel() for weight in weights)
    adapters = sum(rank * sum(weight.shape) for weight in weights)
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    pairs = sum(n * (n + 1) / 2 for n in lengths) * config.num_hidden_layers
    head = model.get_output_embeddings().weight.numel()
    tokens = sum(lengths)
    return float(2 * tokens * (2 * frozen + 3 * adapters) + 12 * width * pairs + 4 * head * learned)


class Gemm:
    """A product as the model's largest linear makes it, timed.

    tokens: rows of the other factor.
    """

    def __init__(
        self, weight: Tensor, tokens: int, dtype: torch.dtype, seconds: float = 0.3
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(weight.shape, generator=generator).to(dtype)
        self.x = torch.randn(tokens, weight.shape[1], generator=generator).to(dtype)
        self.seconds = seconds

    def lap(self) -> Lap:
        """As many products as fit into `seconds`; the lap's `tokens` are operations."""
        self.x @ self.weight.t()
        cpu, start, count = time.process_time(), time.perf_counter(), 0
        while time.perf_counter() - start < self.seconds:
            self.x @ self.weight.t()
            count += 1
        run, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Lap(0.0, run, cpu, count * 2 * self.x.shape[0] * self.weight.numel())


def least(gemm: Timed, flops: float, speeds: Mapping[str, float]) -> Section:
    """What the arithmetic of a token alone would take, and how near others come.

    flops: of a token, on average over the rows. speeds: tokens per second of
    processor time by label.
    """
    rate = median(lap.tokens / lap.cpu for lap in gemm.laps)
    lines = [
        f"A token takes {flops / 1e9:.3f} GFLOP forward and backward (frozen weights twice, "
        "adapters thrice, the head on learned tokens, attention to what came before). Products "
        f"as the model's largest linear makes them run at {rate / 1e9:.0f} GFLOP/s here, measured "
        f"in the same rounds: {rate / flops:.0f} tokens/s would be the limit. By processor time:",
        *(f"{label}: {speed * flops / rate:.0%} of it." for label, speed in speeds.items()),
    ]
    return Section("The floor", " ".join(lines), [], [])
