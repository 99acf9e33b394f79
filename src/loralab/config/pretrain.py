"""`kind: pretrain`: a small decoder from nothing, on text and on prompts with solutions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from loralab.config.sections import (
    CommonConfig,
    GenerationConfig,
    GuardConfig,
    Positive,
    Section,
)
from loralab.config.training import ContaminationConfig, TrainingConfig


class DecoderShape(Section):
    """The decoder's sizes, as `loralab.models.decoder_config` explains them."""

    hidden_size: Positive = 128
    intermediate_size: Positive = 384
    num_hidden_layers: Positive = 4
    num_attention_heads: Positive = 4
    num_key_value_heads: Positive | None = None
    max_position_embeddings: int = Field(default=256, ge=2)
    attention: Literal["split", "fused"] = "split"
    num_experts: int = Field(default=0, ge=0)
    num_experts_per_tok: Positive = 2
    load_balance_coef: float = Field(default=0.01, ge=0)
    attention_sinks: int = Field(default=0, ge=0)
    cache_size: Positive | None = None
    rope_theta: float = Field(default=10000.0, gt=0)
    tie_word_embeddings: bool = True


class TokenizerConfig(Section):
    """A byte-level BPE of vocab_size tokens trained on the corpus, or the one found at `path`."""

    vocab_size: int = Field(default=4096, ge=259)
    path: str | None = None


class SourceConfig(Section):
    """Text to learn from: a file, or a folder of them, or a hub name.

    format: "text" is any text or code file (.gz too; in a folder those with one of `suffixes`), or
    rows with `text`. "pairs" is rows with `prompt` and `solution`, of which the solution alone is
    learned. subset: the configuration of a hub dataset. separator: text between documents; null
    takes a file as one document. weight: its share of the rows seen, beside the other sources'
    weights; all sources have one, or none, which shows every row equally often. limit: documents
    taken, null for all. test_path: held-out text; without it the last test_share of the documents,
    0 for none.
    """

    path: str = Field(min_length=1)
    format: Literal["text", "pairs"] = "text"
    subset: str | None = None
    suffixes: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = (".txt", ".txt.gz")
    separator: str | None = Field(default=None, min_length=1)
    weight: float | None = Field(default=None, gt=0)
    limit: Positive | None = None
    test_path: str | None = None
    test_share: float = Field(default=0.05, ge=0, lt=1)


class HeldOutConfig(Section):
    """Loss on the first `limit` held-out rows and texts from `prompts`, before and after.

    every: steps from one evaluation during training to the next, null for none.
    """

    limit: Positive | None = 64
    every: Positive | None = None
    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ("",)


class PretrainConfig(CommonConfig):
    """Train a decoder from random weights.

    `dtype: bfloat16` keeps the weights in float32 and runs products in bf16 (AMP).

    contamination: of sources of pairs, against what they hold out and the tasks it names; plain
    text is not looked at.

    Rows are training.max_length tokens. With `training.packing` documents are laid end to end and
    cut into rows, else each row holds one document, or a part of a long one. Either way no
    document sees another.
    """

    kind: Literal["pretrain"]
    model: Literal["decoder"] = "decoder"
    decoder: DecoderShape = DecoderShape()
    tokenizer: TokenizerConfig = TokenizerConfig()
    corpus: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    contamination: ContaminationConfig = ContaminationConfig()
    training: TrainingConfig
    evaluation: HeldOutConfig = HeldOutConfig()
    generation: GenerationConfig = GenerationConfig(max_new_tokens=128, temperature=0.8, top_k=40)
    guard: GuardConfig | None = GuardConfig()

    @model_validator(mode="after")
    def _consistent(self) -> PretrainConfig:
        shape, longest = self.decoder, self.training.max_length
        if longest > shape.max_position_embeddings:
            raise ValueError(
                f"training.max_length {longest} is more than decoder.max_position_embeddings "
                f"{shape.max_position_embeddings}"
            )
        if len({source.weight is None for source in self.corpus}) > 1:
            raise ValueError("either every source of the corpus has a weight, or none has")
        return self
