"""Attention for sequences laid end to end: each attends to itself alone, and nothing is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from loralab.engines.attention import attention_configs

NAME = "loralab_sequences"

MODEL_TYPES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gemma3_text", "gpt2"}
)
"""Models known to take their positions from position_ids and their attention from the interface."""

_UNKNOWN = ("softcap", "s_aux", "position_bias")


def sequence_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sequence_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, as `AttentionInterface` calls it.

    query: (1, heads, tokens, d). key, value: (1, key heads, tokens, d). sequence_lengths: sum to
    tokens; None is one sequence. Returns (1, tokens, heads, d).
    """
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{NAME}: attention with {name}")
    if query.shape[0] != 1:
        raise ValueError(f"{NAME}: {query.shape[0]} rows; expected sequences in one row")
    lengths = list(sequence_lengths or (query.shape[2],))
    share = query.shape[1] // key.shape[1]
    if share > 1:
        key, value = (t.repeat_interleave(share, dim=1) for t in (key, value))
    parts = [
        scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_band(q, sliding_window),
            dropout_p=dropout,
            is_causal=_band(q, sliding_window) is None,
            scale=scaling,
        ).transpose(1, 2)
        for q, k, v in zip(*(torch.split(t, lengths, 2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """(tokens, tokens) bool of a causal sliding window; None where it is plain causal."""
    tokens = query.shape[2]
    if window is None or tokens <= window:
        return None
    places = torch.arange(tokens, device=query.device)
    behind = places[:, None] - places[None, :]
    return (behind >= 0) & (behind < window)


AttentionInterface.register(NAME, sequence_attention)


def reason_against(model: Any) -> str | None:
    """Why a causal LM has to be fed padded batches; None where it can do without."""
    kind = getattr(model.config, "model_type", "?")
    if kind not in MODEL_TYPES:
        return f"model type {kind!r} is not among those known to keep sequences apart"
    names = {c._attn_implementation_internal for c in attention_configs(model)}
    if names - {"sdpa", "eager"}:
        return f"its attention runs through {', '.join(sorted(map(str, names)))}"
    return None


@contextmanager
def named_attention(model: nn.Module, name: str | None) -> Iterator[None]:
    """Run a model's attention through the function registered as `name` (None: its own)."""
    configs = attention_configs(model)
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name or config._attn_implementation_internal
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own
