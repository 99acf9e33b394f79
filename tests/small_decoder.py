"""Decoders of a few thousand random weights, and tokens for them."""

from __future__ import annotations

from typing import Any

import torch

import tiny
from loralab.models.decoder import DecoderConfig, DecoderForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "pad_token_id": tiny.PAD,
}
KINDS: dict[str, dict[str, Any]] = {
    "split": {},
    "fused": {"attention": "fused"},
    "tied": {"tie_word_embeddings": True},
    "experts": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40},
    "fused experts": {"attention": "fused", "num_experts": 3, "num_experts_per_tok": 1},
}


def decoder(seed: int = 0, **changes: Any) -> Any:
    """Random everywhere, norms too, large enough to give distinct logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        context = min(changes.get("cache_size", 96), 96)
        shape = {**SHAPE, "max_position_embeddings": context, **changes}
        made = DecoderForCausalLM(DecoderConfig(**shape))
        for parameter in made.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return made.eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCABULARY, (rows, length), generator=generator)


def labelled(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels of rows padded on the right, their first third not learned."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, length - 3 * row :] = 0 if row else 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : length // 3] = -100
    return ids, mask, labels
