"""`kind: distill`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from loralab.config.sections import CommonConfig, GenerationConfig, Positive, Section, TaskConfig
from loralab.config.training import ContaminationConfig


class EndpointConfig(Section):
    """An OpenAI-compatible server, such as vLLM's or SGLang's.

    url: up to and with the version, "http://localhost:8000/v1". key_variable: the environment
    variable that holds its key, null sends none. workers: requests at one time. timeout: seconds
    for one answer. retries: of a request that the server was too busy for.
    """

    url: str = Field(pattern=r"^https?://[^\s]+$")
    key_variable: str | None = None
    workers: Positive = 8
    timeout: float = Field(default=120.0, gt=0)
    retries: int = Field(default=3, ge=0)


class DistillConfig(CommonConfig):
    """Completions of a teacher that the task scores, kept as rows for `kind: sft`.

    `model` is the teacher, by its name on the endpoint where there is one. adapter: a directory in
    PEFT's format that the teacher answers with. quantization: of the model under it; an adapter of
    a pipeline's stage brings that stage's own. examples: of the split, null for all. samples: of
    each. min_reward: null keeps what is correct. batch: examples that are answered, judged and
    written before the next.
    """

    kind: Literal["distill"]
    task: TaskConfig
    split: Literal["train", "test"] = "train"
    endpoint: EndpointConfig | None = None
    adapter: str | None = None
    quantization: Literal["nf4", "int8"] | None = None
    examples: Positive | None = None
    samples: Positive = 4
    min_reward: float | None = None
    contamination: ContaminationConfig = ContaminationConfig()
    batch: Positive = 64
    generation: GenerationConfig = GenerationConfig(max_new_tokens=256, temperature=0.8)

    @model_validator(mode="after")
    def _one_teacher(self) -> DistillConfig:
        if self.endpoint is not None and self.adapter is not None:
            raise ValueError("no adapter with an endpoint: name the adapter's model as `model`")
        if self.endpoint is not None and self.quantization is not None:
            raise ValueError("no quantization with an endpoint: its server loads the model")
        if self.samples > 1 and self.generation.temperature == 0:
            raise ValueError("generation.temperature above 0 where samples is above 1")
        return self
