"""The shape of the small decoder, as Transformers keeps it in config.json."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedConfig

MODEL_TYPE = "loralab_decoder"


class DecoderConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes and options of `DecoderForCausalLM`; names are Transformers' own where it has them.

    attention: "split" has q_proj, k_proj, v_proj, o_proj; "fused" has qkv, out_proj.
    num_experts: SwiGLU experts of a layer, of which a token takes num_experts_per_tok; 0 is one
        plain SwiGLU. load_balance_coef: weight of the load-balancing loss beside the loss.
    cache_size: keys and values that are kept of any text, however long: the first attention_sinks
        tokens and the last ones (StreamingLLM, arXiv:2309.17453). None keeps all. No less than
        max_position_embeddings: up to there the model is as any other.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  Transformers' own form

    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 256
    attention: Literal["split", "fused"] = "split"
    num_experts: int = 0
    num_experts_per_tok: int = 2
    load_balance_coef: float = 0.01
    attention_sinks: int = 0
    cache_size: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check()
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def _check(self) -> None:
        """Raise ValueError for sizes that do not fit together."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.attention not in ("split", "fused"):
            raise ValueError(f"attention is {self.attention!r}; expected 'split' or 'fused'")
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not an even multiple of the "
                f"{heads} attention heads"
            )
        if groups is None or groups < 1 or heads % groups:
            raise ValueError(f"{heads} attention heads cannot share {groups} key-value heads")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; expected 1 to the "
                f"{self.num_experts} experts"
            )
        if self.cache_size is None and self.attention_sinks:
            raise ValueError(
                f"attention_sinks is {self.attention_sinks} but cache_size is null: a cache that "
                "keeps everything has no sinks"
            )
        if self.cache_size is not None and self.attention_sinks >= self.cache_size:
            raise ValueError(
                f"cache_size {self.cache_size} has no room behind {self.attention_sinks} sinks"
            )
        if self.cache_size is not None and self.cache_size < self.max_position_embeddings:
            raise ValueError(
                f"cache_size {self.cache_size} is less than max_position_embeddings "
                f"{self.max_position_embeddings}, the tokens that are read with nothing let go"
            )
