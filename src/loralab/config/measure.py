"""`kind: eval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from loralab.config.pretrain import SourceConfig
from loralab.config.sections import (
    CommonConfig,
    GenerationConfig,
    Positive,
    Section,
    TaskConfig,
)


class ModelConfig(Section):
    """A model, by its name or directory, and an adapter on it (a directory in PEFT's format).

    model: null is the config's own. A text alone is the model. quantization: of the model under
    the adapter; an adapter of a pipeline's stage brings that stage's own.
    """

    model: str | None = Field(default=None, min_length=1)
    adapter: str | None = Field(default=None, min_length=1)
    quantization: Literal["nf4", "int8"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, values: Any) -> Any:
        return {"model": values} if isinstance(values, str) else values


class MeasureConfig(Section):
    """One column of numbers.

    task: scored on the first `limit` examples of the split; of a text, perplexity over its first
    `limit` tokens. corpus: perplexity over the documents that it holds out, each read alone, the
    first `limit` of them; the same corpus as in `kind: pretrain` holds out the same documents.
    samples, k: completions of each example, and for each k the chance that one of k is right.
    """

    task: TaskConfig | None = None
    corpus: SourceConfig | None = None
    split: Literal["train", "test"] = "test"
    limit: Positive | None = None
    generation: GenerationConfig = GenerationConfig(max_new_tokens=256)
    samples: Positive = 1
    k: Annotated[tuple[Positive, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _one_source(self) -> MeasureConfig:
        if (self.task is None) == (self.corpus is None):
            raise ValueError("either task or corpus, which say what to measure on")
        if self.corpus is not None and (self.samples > 1 or self.k):
            raise ValueError("samples and k with a task alone")
        return self


class EvalConfig(CommonConfig):
    """Measure models side by side: perplexity on texts, scores on tasks.

    models, measures: by the names that stand in the table.
    """

    kind: Literal["eval"]
    model: str = Field(default="smollm2", min_length=1)
    models: Mapping[str, ModelConfig] = Field(min_length=1)
    measures: Mapping[str, MeasureConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _plain_names(self) -> EvalConfig:
        for name in (*self.models, *self.measures):
            if not name or "/" in name or name.startswith("."):
                raise ValueError(
                    f"names of models and measures that can name a file (one is {name!r})"
                )
        return self

    def model_of(self, name: str) -> str:
        """The model that stands under this name, without its adapter."""
        return self.models[name].model or self.model
