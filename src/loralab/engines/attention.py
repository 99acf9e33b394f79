"""Decode attention for grouped heads, swapped in while the engine's own forward runs.

With one query token per row, the heads that share a key head become query positions of it: the
same numbers from one small product per key head, where `enable_gqa` takes a slow path on the CPU
(5 x slower at query length 1). Everything else goes to Transformers' own SDPA function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "loralab_population"


def population_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `AttentionInterface` calls it.

    query: (rows, heads, queries, d). key, value: (rows, key heads, keys, d). attention_mask:
    (rows, 1 or heads, queries, keys) bool, None for plain causal.
    Returns (rows, queries, heads, d).
    """
    rows, heads, queries, _ = query.shape
    key_heads = key.shape[1]
    share = heads // key_heads
    if queries == 1 and share > 1 and kwargs.get("position_bias") is None:
        folded = query.reshape(rows, key_heads, share, query.shape[-1])
        mask = attention_mask
        if mask is not None and mask.shape[1] == heads:
            mask = mask.reshape(mask.shape[0], key_heads, share, mask.shape[-1])
        out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        return out.reshape(rows, 1, heads, value.shape[-1]), None
    if share > 1 and query.device.type == "cpu" and hasattr(module, "num_key_value_groups"):
        key, value = repeat_kv(key, share), repeat_kv(value, share)
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            scale=scaling,
            is_causal=attention_mask is None and queries > 1,
        )
        return out.transpose(1, 2).contiguous(), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return result


AttentionInterface.register(NAME, population_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def swapped_attention(configs: list[Any]) -> Iterator[None]:
    """Run with `population_attention` where the model runs SDPA; put its own name back after.

    Eager, flash and flex models keep what they have: what a model chose not to run through SDPA
    (soft-capped or sink attention, say) SDPA may not compute.
    """
    swapped = [c for c in configs if c._attn_implementation_internal == "sdpa"]
    for config in swapped:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config in swapped:
            config._attn_implementation_internal = "sdpa"


def attention_configs(model: nn.Module) -> list[Any]:
    """The distinct config objects that a model's modules read their attention's name from."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())
