"""Which modules an adapter changes, in Linear and in Conv1D models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loralab.adapters.targets import linear_weights
from loralab.errors import UserError


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def test_all_linear_is_everything_but_the_head() -> None:
    weights = linear_weights(llama())
    assert len(weights) == 2 * 7
    assert weights["model.layers.1.mlp.down_proj"].shape == (16, 24)
    assert not any(w.requires_grad for w in weights.values())


def test_names_pick_modules() -> None:
    model = llama()
    assert list(linear_weights(model, ["k_proj", "layers.0.mlp.up_proj"])) == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    # As in PEFT a name is a whole part of the path, not the end of one.
    fused = nn.ModuleDict({"gate_up_proj": nn.Linear(2, 3), "up_proj": nn.Linear(2, 3)})
    assert list(linear_weights(fused, ["up_proj"])) == ["up_proj"]
    with pytest.raises(UserError, match="no linear module is named 'query'; this model has down_p"):
        linear_weights(model, ["query"])
    with pytest.raises(UserError, match='expected "all-linear" or a list'):
        linear_weights(model, "q_proj")


def test_conv1d_comes_out_by_in() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    weights = linear_weights(model)
    assert weights["transformer.h.0.attn.c_attn"].shape == (48, 16)
    assert weights["transformer.h.0.mlp.c_fc"].shape == (64, 16)
    own = model.transformer.h[0].attn.c_attn.weight
    assert torch.equal(weights["transformer.h.0.attn.c_attn"], own.t())
    assert "lm_head" not in weights
