"""A cache of fixed size with attention sinks is StreamingLLM's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as tf

from loralab.models.decoder_export import to_llama
from loralab.models.sinks import SinkCache
from small_decoder import decoder, tokens


def streaming_reference(model: Any, ids: torch.Tensor, sinks: int, size: int) -> torch.Tensor:
    """StreamingLLM written out: keys before rotation, rotated by their place in the cache, anew at
    every token."""
    caches: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in model.model.layers]
    llama = tf.models.llama.modeling_llama
    out = []
    for token in ids[0]:
        x = model.model.embed_tokens(token)[None, None]
        for layer, cache in zip(model.model.layers, caches, strict=True):
            q, k, v = layer.self_attn.project(layer.input_layernorm(x))
            cache.append((k, v))
            if len(cache) > size:
                del cache[sinks]
            keys, values = (torch.cat(part, dim=2) for part in zip(*cache, strict=True))
            rope = llama.LlamaRotaryEmbedding(to_llama(decoder()).config)
            cos, sin = rope(keys, torch.arange(len(cache))[None])
            _, keys = llama.apply_rotary_pos_emb(keys, keys, cos, sin)
            q, _ = llama.apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
            keys, values = (t.repeat_interleave(2, dim=1) for t in (keys, values))
            weights = (q @ keys.transpose(2, 3) * layer.self_attn.scaling).softmax(-1)
            mixed = (weights @ values).transpose(1, 2).reshape(1, 1, -1)
            x = x + layer.self_attn.o_proj(mixed)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        out.append(model.lm_head(model.model.norm(x)))
    return torch.cat(out, dim=1)


@pytest.mark.parametrize(("sinks", "size"), [(0, 7), (1, 8), (3, 9), (4, 40)])
@torch.no_grad()
def test_sinks_are_those_of_streaming_llm(sinks: int, size: int) -> None:
    model, ids = decoder(cache_size=size, attention_sinks=sinks), tokens(1, 30)
    expected = streaming_reference(model, ids, sinks, size)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)
    for cuts in (range(31), (0, 30), (0, 5, 6, 19, 30), (0, min(size, 29), 30)):
        cache, parts = SinkCache(model.config), []
        for a, b in pairwise(cuts):
            parts.append(model(ids[:, a:b], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-4)
        assert cache.kept == min(size, 30)
        assert cache.get_seq_length() == 30
        assert cache.layers[0].keys.shape[2] == min(size, 30)
    plain = decoder()(ids).logits
    assert torch.allclose(plain[:, :size], expected[:, :size], atol=1e-5)
    assert torch.allclose(plain, expected, atol=1e-3) == (size >= 30)


def test_generation_with_sinks_runs_past_the_trained_context() -> None:
    model, ids = decoder(cache_size=10, attention_sinks=2, eos_token_id=None), tokens(2, 6)
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
    )
    assert out.shape == (2, 46)
    for at in range(6, 46):
        logits = model(out[:, :at], use_cache=False).logits[:, -1]
        assert torch.equal(logits.argmax(-1), out[:, at])
    beams = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, num_beams=3, do_sample=False
    )
    assert beams.shape == (2, 26)


def test_what_a_cache_of_fixed_size_cannot_do_is_said() -> None:
    model, ids = decoder(cache_size=10, attention_sinks=2), tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="padding"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="SinkCache"):
        model(ids, past_key_values=tf.DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="16 tokens are more than cache_size 10"):
        model(ids[:1], sequence_lengths=(16,), use_cache=False)
    # In short texts nothing is let go, and padding is as in any model.
    plain = decoder()(ids[:, :9], attention_mask=mask[:, :9], use_cache=False).logits
    short = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=False).logits
    assert torch.equal(short, plain)
