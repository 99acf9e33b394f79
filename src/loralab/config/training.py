"""Sections of what trains by gradient, and `kind: sft`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from loralab.config.sections import (
    AdapterConfig,
    CommonConfig,
    Fraction,
    GenerationConfig,
    GuardConfig,
    Positive,
    Section,
    TaskConfig,
)


class TrainingConfig(Section):
    """Gradient training: `steps` updates of the weights, or `epochs` passes over the rows.

    An update sees batch_size * grad_accumulation rows, of all processes together where several
    train (docs/distributed.md), its loss a mean over their learned tokens.
    schedule: of the learning rate after the warm-up, down to 0 but for "constant". warmup: a
    number of steps, or below 1 a share of them. max_grad_norm: 0 is off. max_length: tokens; the
    rest of a row is cut off. optimizer: as Transformers names it (adamw_torch, adamw_8bit,
    adafactor ...). packing: rows share a batch place, up to max_length tokens, without seeing each
    other. fast: our step (the loss on learned tokens alone, no padding, fused LoRA) where the
    model allows it. save_every: steps between checkpoints, from which a killed run goes on.
    report_to: trackers that get each step's numbers too; they have to be installed.
    """

    steps: Positive | None = None
    epochs: float | None = Field(default=None, gt=0)
    batch_size: Positive = 8
    grad_accumulation: Positive = 1
    lr: float = Field(default=2e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float = Field(default=0.0, ge=0)
    weight_decay: Fraction = 0.0
    max_grad_norm: float = Field(default=1.0, ge=0)
    max_length: int = Field(default=1024, ge=2)
    optimizer: str = Field(default="adamw_torch", min_length=1)
    gradient_checkpointing: bool = False
    packing: bool = False
    fast: bool = True
    log_every: Positive = 1
    save_every: Positive = 100
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False)
    ] = ()

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("either steps or epochs")
        return self


class DataConfig(Section):
    """Rows of a .json, .jsonl, .jsonl.gz or .parquet file, or of a folder of them.

    prompt_completion: `prompt` and `completion`, each text or messages. chat: `messages`, of which
    the last turn of the assistant is learned. text: `text`, learned whole. test_path: held-out
    rows; without it test_share of the rows, chosen by the seed.
    """

    path: str = Field(min_length=1)
    format: Literal["prompt_completion", "chat", "text"] = "prompt_completion"
    test_path: str | None = None
    test_share: float = Field(default=0.1, gt=0, lt=1)


class EvaluationConfig(Section):
    """Completions of the first `limit` examples (null: all) before and after, and between.

    every: steps from one evaluation during training to the next, null for none.
    """

    split: Literal["train", "test"] = "test"
    limit: Positive | None = 32
    every: Positive | None = None


class GradientConfig(CommonConfig):
    """What every kind trained by gradient says.

    `full: true` trains the model itself, without adapter.
    """

    adapter: AdapterConfig | None = AdapterConfig()
    full: bool = False
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    generation: GenerationConfig = GenerationConfig(max_new_tokens=256)
    guard: GuardConfig | None = GuardConfig()

    @model_validator(mode="before")
    @classmethod
    def _no_adapter_in_full(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("full") is True:
            return {"adapter": None, **values}
        return values

    @model_validator(mode="after")
    def _adapter_or_full(self) -> GradientConfig:
        if self.full == (self.adapter is not None):
            raise ValueError("either adapter or full: true")
        return self


class CausalConfig(GradientConfig):
    """What the kinds say that train a causal language model.

    quantization: the base's weights in 4 or 8 bits, by bitsandbytes, under an adapter that is not
    (QLoRA, arXiv:2305.14314); null leaves them as they are. The reference of a preference or a
    policy is then the quantised base.
    """

    quantization: Literal["nf4", "int8"] | None = None

    @model_validator(mode="after")
    def _trainable(self) -> CausalConfig:
        if self.full and self.quantization is not None:
            raise ValueError("no quantization with full: true, quantised weights cannot be trained")
        return self


class ContaminationConfig(Section):
    """Training rows that hold a row which is evaluated on, by 13 words in a row (`data check`).

    action: what is done with a training row that most of an evaluated row stands in. "error" names
    it and stops before training, "drop" leaves it out and says how many, "off" does not look.
    against: tasks beside the run's own whose test rows must not be learned either.
    """

    action: Literal["error", "drop", "off"] = "error"
    against: Annotated[tuple[TaskConfig, ...], Field(strict=False)] = ()


class SftConfig(CausalConfig):
    """Supervised fine-tuning: learn a task's gold answers, or completions from a file.

    Either `task` or `data` gives the rows.
    """

    kind: Literal["sft"]
    task: TaskConfig | None = None
    data: DataConfig | None = None
    contamination: ContaminationConfig = ContaminationConfig()

    @model_validator(mode="after")
    def _one_source(self) -> SftConfig:
        if (self.task is None) == (self.data is None):
            raise ValueError("either task or data, which say what to learn")
        return self
