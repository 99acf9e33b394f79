"""Attention sinks: any length of text in a key-value cache of fixed size (arXiv:2309.17453).

The cache keeps the first tokens of a text, which trained models lean on whatever they say, and the
last ones; positions count inside the cache, so that no distance exceeds those seen in training.
Keys are kept unrotated and are rotated by their place in the cache when they are used.

The same attention in one pass over many tokens: rotary scores depend on distances alone, and a
token at place t has its sinks at the distance min(t, size - 1) - s, all others at t - j. So a query
carries two rotations side by side, one for the sinks and one for the rest, and each key is zero
in the half that is not for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicLayer

from loralab.models.decoder_config import DecoderConfig
from loralab.models.rope import angles, rotate


class SinkLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's unrotated keys, and values: the first `sinks` tokens and the last of the rest."""

    is_croppable = False

    def __init__(self, sinks: int, size: int) -> None:
        super().__init__()
        self.sinks = sinks
        self.size = size
        self.seen = 0
        """Tokens of the text so far, those that were let go included."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in (rows, key heads, new, d); what was kept with the new ones behind it."""
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[-2]
        excess = keys.shape[-2] - self.size
        if excess > 0:
            self.keys, self.values = (
                torch.cat([t[:, :, : self.sinks], t[:, :, self.sinks + excess :]], dim=2)
                for t in (keys, values)
            )
        return keys, values

    @property
    def kept(self) -> int:
        """Tokens in the cache."""
        return int(self.keys.shape[-2]) if self.is_initialized and self.keys.numel() else 0

    def get_seq_length(self) -> int:
        """Tokens of the text so far: what `generate` counts by."""
        return self.seen

    def get_max_length(self) -> int:
        """Tokens that are kept."""
        return self.size

    def reset(self) -> None:
        """Forget the text."""
        super().reset()
        self.seen = 0


class SinkCache(Cache):  # type: ignore[misc]
    """A cache of fixed size for a decoder whose config has a `cache_size`."""

    def __init__(self, config: DecoderConfig) -> None:
        assert config.cache_size is not None
        super().__init__(
            layers=[
                SinkLayer(config.attention_sinks, config.cache_size)
                for _ in range(config.num_hidden_layers)
            ]
        )

    @property
    def kept(self) -> int:
        """Tokens in the cache."""
        return int(self.layers[0].kept)


def sink_attention(
    query: Tensor, key: Tensor, value: Tensor, config: DecoderConfig, scaling: float
) -> Tensor:
    """Attention within a cache of fixed size, for all queries at once.

    query: (rows, heads, queries, d), unrotated. key, value: (rows, key heads, keys, d), unrotated,
    the last of them the queries' own, those before as the cache kept them.
    Returns (rows, queries, heads, d).
    """
    size, sinks, theta = config.cache_size, config.attention_sinks, config.rope_theta
    assert size is not None
    keys, width = key.shape[2], key.shape[3]
    places = torch.arange(keys, device=key.device)
    at = places[keys - query.shape[2] :]
    is_sink = places < sinks
    key = rotate(key, *angles(places, width, theta))
    near = rotate(query, *angles(at, width, theta))
    if keys > size and sinks:
        far = rotate(query, *angles(at.clamp(max=size - 1), width, theta))
        near = torch.cat([near, far], dim=-1)
        for_sinks = is_sink[:, None].to(key.dtype)
        key = torch.cat([key * (1 - for_sinks), key * for_sinks], dim=-1)
    behind = at[:, None] - places
    seen = (behind >= 0) & ((behind < size - sinks) | is_sink)
    share = query.shape[1] // key.shape[1]
    if share > 1:
        key, value = (t.repeat_interleave(share, dim=1) for t in (key, value))
    out = scaled_dot_product_attention(near, key, value, attn_mask=seen, scale=scaling)
    return out.transpose(1, 2)
