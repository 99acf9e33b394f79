"""The small decoder: a Llama-like model of our own for pretraining, small and whole.

RMSNorm, SwiGLU or a mixture of experts, rotary positions, grouped-query attention, tied
embeddings, and, with a `cache_size`, attention sinks. With split attention and neither experts nor
sinks it computes what Transformers' Llama computes, to which `export` writes it.

Importing this module makes AutoConfig and AutoModelForCausalLM know the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loralab.models.decoder_config import MODEL_TYPE, DecoderConfig
from loralab.models.moe import Experts, SwiGLU, load_balance
from loralab.models.rope import angles, rotate
from loralab.models.sinks import SinkCache, sink_attention

__all__ = ["DecoderConfig", "DecoderForCausalLM", "DecoderModel"]


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps), in float32 within (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) to the same shape and dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention; heads in groups share keys and values (arXiv:2305.13245)."""

    is_causal = True

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        assert groups is not None
        self.num_key_value_groups = heads // groups
        self.scaling = self.head_dim**-0.5
        self.widths = [heads * self.head_dim, groups * self.head_dim, groups * self.head_dim]
        if config.attention == "fused":
            self.qkv = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
            self.out_proj = nn.Linear(self.widths[0], config.hidden_size, bias=False)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                nn.Linear(config.hidden_size, width, bias=False) for width in self.widths
            )
            self.o_proj = nn.Linear(self.widths[0], config.hidden_size, bias=False)

    def project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, (rows, heads or key heads, tokens, head_dim) each."""
        if self.config.attention == "fused":
            parts = self.qkv(x).split(self.widths, dim=-1)
        else:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return [part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts]

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """x (rows, tokens, hidden) to its like. rotation None: within a cache of fixed size."""
        query, key, value = self.project(x)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if rotation is None:
            out = sink_attention(query, key, value, self.config, self.scaling)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention
            )
            out, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        out = out.reshape(*x.shape[:-1], -1)
        projected: Tensor = (
            self.out_proj(out) if self.config.attention == "fused" else self.o_proj(out)
        )
        return projected


def eager_attention(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in full, as `AttentionInterface` calls it: (rows, tokens, heads, d), weights."""
    share = module.num_key_value_groups
    key, value = (t.repeat_interleave(share, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class DecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp: nn.Module = Experts(config) if config.num_experts else SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, module in self.named_modules():
            if name.endswith(("o_proj", "out_proj", "down_proj")):
                module.adds_to_stream = True

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """x (rows, tokens, hidden) to the same shape, and router logits where there are experts."""
        x = x + self.self_attn(self.input_layernorm(x), **kwargs)
        out = self.mlp(self.post_attention_layernorm(x))
        out, router = out if isinstance(out, tuple) else (out, None)
        return x + out, router


class DecoderPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What Transformers asks of every model of an architecture."""

    config_class = DecoderConfig
    config: DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012  Transformers' own form
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal; what is added to the residual stream smaller by sqrt(2 layers), as in GPT-2."""
        if isinstance(module, nn.Linear) and getattr(module, "adds_to_stream", False):
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)
        else:
            super()._init_weights(module)


class DecoderModel(DecoderPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states (rows, tokens, hidden); router_logits one (rows * tokens, experts) a layer.

        input_ids: (rows, tokens). attention_mask: (rows, past + tokens), 0 on padding.

        Raises:
            ValueError: both or neither of ids and embeddings; with a cache of fixed size, padding,
                or a cache of another kind that outgrew it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        if self._rolls(x, past_key_values, kwargs.get("sequence_lengths")):
            if attention_mask is not None and not bool(attention_mask.bool().all()):
                raise ValueError(
                    "padding cannot share a cache of fixed size: give one sequence at a time, or "
                    "sequences of one length"
                )
            rotation, mask = None, None
        else:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            if position_ids is None:
                position_ids = (torch.arange(x.shape[1], device=x.device) + past)[None]
            rotation = angles(position_ids, self.config.head_dim, self.config.rope_theta)
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        routers, states = [], [x]
        for layer in self.layers:
            x, router = layer(
                x,
                rotation=rotation,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            routers.append(router)
            states.append(x)
        x = self.norm(x)
        return MoeModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states[:-1], x) if output_hidden_states else None,
            router_logits=tuple(routers) if self.config.num_experts else None,
        )

    def _rolls(self, x: Tensor, cache: Cache | None, lengths: Any) -> bool:
        """Whether attention has to happen within a cache of fixed size."""
        size = self.config.cache_size
        if size is None:
            return False
        if isinstance(cache, SinkCache):
            return True
        past = 0 if cache is None else cache.get_seq_length()
        longest = past + (x.shape[1] if lengths is None else max(lengths))
        if longest <= size:
            return False
        if cache is not None or lengths is not None:
            raise ValueError(
                f"{longest} tokens are more than cache_size {size}, which only a SinkCache, or one "
                "sequence without any cache, can exceed"
            )
        return True


def new_cache(config: DecoderConfig) -> Cache:
    """An empty cache of the kind the config asks for."""
    return DynamicCache(config=config) if config.cache_size is None else SinkCache(config)


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The decoder with its head: predicts each next token.

    The loss is the mean negative log-likelihood of the labels; in training, with experts, plus
    load_balance_coef times `load_balance`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = DecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits (rows, tokens or logits_to_keep, vocabulary), and the loss where there are labels.

        labels: (rows, tokens), -100 where nothing is learned. num_items_in_batch: learned tokens
        of the whole update, where gradients of several batches are added up.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits: Tensor = self.lm_head(hidden[:, kept])
        loss, extra = None, None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            extra = self.auxiliary_loss(outputs, labels, attention_mask, num_items_in_batch)
            if extra is not None:
                loss = loss + extra
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=extra,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
        )

    def auxiliary_loss(
        self,
        outputs: MoeModelOutputWithPast,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Any = None,
    ) -> Tensor | None:
        """What experts add to the loss in training, None in evaluation and without any.

        Of several batches of one update each adds its share of the learned tokens, so that the sum
        does not grow with their number.
        """
        if outputs.router_logits is None or not self.training:
            return None
        loss = load_balance(outputs.router_logits, self.config.num_experts_per_tok, attention_mask)
        loss = self.config.load_balance_coef * loss
        if num_items_in_batch is not None:
            loss = loss * ((labels[:, 1:] != -100).sum() / num_items_in_batch)
        return loss

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if (
            self.config.cache_size is not None
            and model_kwargs.get("past_key_values") is None
            and generation_config.use_cache is not False
        ):
            model_kwargs["past_key_values"] = SinkCache(self.config)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


AutoConfig.register(MODEL_TYPE, DecoderConfig)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)
