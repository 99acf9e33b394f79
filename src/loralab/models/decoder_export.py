"""The small decoder as a Llama or a Mixtral, which Transformers, vLLM and others load.

Fused projections are split into their rows. What those architectures do not have, attention sinks,
is refused unless it is given up on purpose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from loralab import durable
from loralab.errors import UserError
from loralab.models.decoder import DecoderConfig, DecoderForCausalLM

_NAMES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""What the configs of both architectures call by one name."""


def to_llama(model: DecoderForCausalLM, without_sinks: bool = False) -> Any:
    """A LlamaForCausalLM with a copy of the weights.

    without_sinks: let go of the cache of fixed size; texts up to cache_size tokens stay the same.

    Raises:
        UserError: the decoder has experts, or sinks that are not let go.
    """
    _refuse_sinks(model, without_sinks)
    if model.config.num_experts:
        raise UserError(
            f"a Llama has no experts, this decoder has {model.config.num_experts}: use to_mixtral"
        )
    return _filled(LlamaForCausalLM, LlamaConfig(**_shared(model)), _attention(model), model)


def to_mixtral(model: DecoderForCausalLM, without_sinks: bool = False) -> Any:
    """A MixtralForCausalLM with a copy of the weights.

    Its loss holds the load balance where it is called with output_router_logits=True. That is not
    set in its config: Transformers' Mixtral then fails in cached generation with a padding mask.

    without_sinks: as for `to_llama`.

    Raises:
        UserError: the decoder has no experts, or sinks that are not let go.
    """
    _refuse_sinks(model, without_sinks)
    config = model.config
    if not config.num_experts:
        raise UserError("a Mixtral needs experts, this decoder has none: use to_llama")
    shape = MixtralConfig(
        **_shared(model),
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        router_aux_loss_coef=config.load_balance_coef,
    )
    weights = _attention(model)
    for index in range(config.num_hidden_layers):
        at = f"model.layers.{index}.mlp"
        each = [
            [
                weights.pop(f"{at}.experts.{expert}.{name}_proj.weight")
                for expert in range(config.num_experts)
            ]
            for name in ("gate", "up", "down")
        ]
        gate, up, down = (torch.stack(parts) for parts in each)
        weights[f"{at}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        weights[f"{at}.experts.down_proj"] = down
    return _filled(MixtralForCausalLM, shape, weights, model)


def from_llama(model: Any) -> DecoderForCausalLM:
    """The same model as a decoder of ours, with a copy of the weights: to read it with sinks.

    Raises:
        UserError: no Llama, or one with biases, scaled positions or heads of another width.
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if (
        config.model_type != "llama"
        or config.attention_bias
        or config.mlp_bias
        or rope.get("rope_type") != "default"
        or config.head_dim * config.num_attention_heads != config.hidden_size
    ):
        raise UserError(f"{type(model).__name__}: not a Llama of the plain kind a decoder can be")
    shape = DecoderConfig(
        **{name: getattr(config, name) for name in _NAMES if name != "head_dim"},
        rope_theta=rope["rope_theta"],
    )
    made: DecoderForCausalLM = _filled(DecoderForCausalLM, shape, dict(model.state_dict()), model)
    return made


def export(source: Path, target: Path, without_sinks: bool = False) -> Path:
    """Write the decoder in a directory as a Llama, or with experts a Mixtral, its tokenizer too.

    Raises:
        UserError: no decoder there, the target exists, or the decoder has sinks.
    """
    from loralab.models.load import load

    if target.exists():
        raise UserError(f"{target} exists: choose a directory that is not there yet")
    model, _ = load(source, dtype="float32")
    if not isinstance(model, DecoderForCausalLM):
        raise UserError(f"{source}: is a {type(model).__name__}, not a decoder of loralab's")
    made = (to_mixtral if model.config.num_experts else to_llama)(model, without_sinks)

    def write(folder: Path) -> None:
        made.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)

    return durable.publish(target, write)


def _refuse_sinks(model: DecoderForCausalLM, without_sinks: bool) -> None:
    size = model.config.cache_size
    if size is not None and not without_sinks:
        raise UserError(
            f"the decoder's cache of {size} tokens has no place in that architecture; "
            "without_sinks=True (--without-sinks) lets it go"
        )


def _shared(model: DecoderForCausalLM) -> dict[str, Any]:
    config = model.config
    shared = {name: getattr(config, name) for name in _NAMES}
    return {
        **shared,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def _attention(model: DecoderForCausalLM) -> dict[str, Tensor]:
    """The decoder's weights with split attention."""
    weights = dict(model.state_dict())
    if model.config.attention == "split":
        return weights
    widths = model.model.layers[0].get_submodule("self_attn").widths
    for index in range(model.config.num_hidden_layers):
        at = f"model.layers.{index}.self_attn"
        parts = weights.pop(f"{at}.qkv.weight").split(widths)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            weights[f"{at}.{name}.weight"] = part
        weights[f"{at}.o_proj.weight"] = weights.pop(f"{at}.out_proj.weight")
    return weights


def _filled(kind: Any, config: Any, weights: dict[str, Tensor], model: Any) -> Any:
    """A new model of another architecture with these weights, and no other."""
    made = kind(config).to(model.dtype)
    made.load_state_dict(weights, strict=True)
    made.tie_weights()
    return made.to(model.device).eval()
