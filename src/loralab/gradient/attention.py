"""Attention for sequences laid end to end: each attends to itself alone, and nothing is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from loralab.engines.attention import attention_configs
from loralab.gradient.known_models import MODEL_TYPES

NAME = "loralab_sequences"

GROUPED = 512
"""Tokens up to which a sequence's scores are held whole: heads * tokens**2 numbers a layer."""

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
    pieces = zip(*(torch.split(t, lengths, 2) for t in (query, key, value)), strict=True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = [
        _grouped(q, k, v, scale, sliding_window)
        if q.device.type == "cpu" and q.shape[2] <= GROUPED and not dropout
        else _sdpa(q, k, v, scale, sliding_window, dropout)
        for q, k, v in pieces
    ]
    return torch.cat(parts, dim=1), None


def _grouped(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """One product for the heads that share a key head, as more queries of it.

    At these lengths SDPA's fused kernel takes twice the time and more on the CPU, most of it in
    the backward pass. Scores are rounded to the weights' dtype, as in Transformers' eager form.
    """
    _, heads, tokens, width = q.shape
    groups = k.shape[1]
    mask = _kept_mask(tokens, window, heads // groups, q.dtype)
    scores = torch.baddbmm(mask, (q * scale).reshape(groups, -1, width), k[0].transpose(1, 2))
    out = torch.bmm(scores.softmax(dim=-1), v[0])
    return out.view(1, heads, tokens, -1).transpose(1, 2)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, dropout: float
) -> Tensor:
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = (t.repeat_interleave(share, dim=1) for t in (k, v))
    banded = window is not None and q.shape[2] > window
    # Made anew: at these lengths a few kept ones are gigabytes.
    mask = _mask(q.shape[2], window, 1, q.dtype, q.device) if banded else None
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=not banded, scale=scale
    ).transpose(1, 2)


def _mask(
    tokens: int, window: int | None, repeats: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(repeats * tokens, tokens), 0 where a query sees a key (causal, in the window), else -inf."""
    hidden = torch.full((tokens, tokens), -torch.inf, dtype=dtype, device=device)
    mask = hidden.triu(1)
    if window is not None:
        mask += hidden.tril_(-window)
    return mask if repeats == 1 else mask.repeat(repeats, 1)


@lru_cache(maxsize=32)
def _kept_mask(tokens: int, window: int | None, repeats: int, dtype: torch.dtype) -> Tensor:
    return _mask(tokens, window, repeats, dtype, torch.device("cpu"))


AttentionInterface.register(NAME, sequence_attention)


def reason_against(model: Any) -> str | None:
    """Why a causal LM has to be fed padded batches; None where it can do without."""
    kind = getattr(model.config, "model_type", "?")
    if kind not in MODEL_TYPES:
        return f"model type {kind!r} is not among those known to keep sequences apart"
    names = {c._attn_implementation_internal for c in attention_configs(model)}
    if names - {"sdpa", "eager", NAME}:
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
