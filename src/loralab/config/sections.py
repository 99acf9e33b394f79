"""The sections that configs of several kinds share, and the rules all of them follow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loralab.dialects import DEFAULT_RANK, in_our_words

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Common rules: unknown keys fail, values keep their type (no "8" for 8), nothing changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TaskConfig(Section):
    """`name` in `loralab tasks`; `options` are that task's keyword arguments."""

    name: str = Field(min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)


class InitConfig(Section):
    """`name` in `loralab inits`; `options` are that initialisation's keyword arguments."""

    name: str = Field(default="zero_b", min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)


class AdapterConfig(Section):
    """An adapter; a LoRA one is dW = alpha / rank * B @ A.

    Also spoken: PEFT's dialect (`r`, `lora_alpha`, `lora_dropout`, `layers_to_transform`) and MLX's
    (`rank`, `scale` = alpha / rank, `num_layers` = the last n layers, -1 all of them, `keys`).
    `type_options` are keyword arguments of LSLoraConfig or SineLoraConfig.
    """

    type: Literal["lora", "lslora", "sinelora"] = "lora"
    rank: Positive = DEFAULT_RANK
    alpha: float = Field(default=8.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: (
        Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    ) = "all-linear"
    num_layers: Annotated[int, Field(ge=-1)] | None = None
    layers_to_transform: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] | None = None
    init: InitConfig = InitConfig()
    type_options: dict[str, Any] = Field(default_factory=dict)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @model_validator(mode="before")
    @classmethod
    def _one_dialect(cls, values: Any) -> Any:
        return in_our_words(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _consistent(self) -> AdapterConfig:
        if self.num_layers is not None and self.layers_to_transform is not None:
            raise ValueError("num_layers or layers_to_transform, not both")
        if self.type == "lora" and self.type_options:
            raise ValueError("no type_options with type: lora")
        return self


class GenerationConfig(Section):
    """How completions are sampled; temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    max_new_tokens: Positive = 64
    temperature: float = Field(default=0.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: Annotated[tuple[str, ...], Field(strict=False)] = ()


class GuardConfig(Section):
    """What watches a run and judges it (`loralab.health`); `guard: null` watches nothing.

    action: of a failure. "warn" says so, "stop" ends the run, "rollback" (by gradient) goes back to
    the last healthy weights and halves the learning rate, the second time it goes back and stops.
    every: steps or generations between looks after the first 50; null makes it as often as keeps
    the time of looking under `budget` of the run's. prompts: what the model is asked at each look;
    null takes twelve of ours.
    """

    action: Literal["warn", "stop", "rollback"] = "warn"
    every: Positive | None = None
    budget: float = Field(default=0.03, gt=0, le=1)
    prompts: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None


class VllmConfig(Section):
    """vLLM in this process. max_loras: adapters in one batch. sequences: in one batch, context:
    tokens of prompt and completion, null: vLLM's and the model's own. tensor_parallel: devices that
    share the model. eager: no CUDA graphs."""

    max_loras: Positive = 16
    sequences: Positive | None = None
    context: Positive | None = None
    tensor_parallel: Positive = 1
    eager: bool = False


class SglangConfig(Section):
    """An SGLang server: the one at `url`, or one that the run starts on this machine and ends.

    key_variable, admin_key_variable: environment variables that hold the server's keys; a server
    that is started gets a random key of its own. command, args: what starts one, and more of its
    options. folder: where adapters are written for it, seen by the server under the same path;
    null takes memory-backed files. max_loras: adapters in one of its batches. batch: prompts a
    request. workers: requests at one time. timeout, start_timeout: seconds. retries: of a request
    that a busy or broken connection lost, and of the server itself where it died.
    """

    url: str | None = Field(default=None, pattern=r"^https?://")
    key_variable: str | None = None
    admin_key_variable: str | None = None
    command: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = (
        "python",
        "-m",
        "sglang.launch_server",
    )
    args: Annotated[tuple[str, ...], Field(strict=False)] = ()
    folder: str | None = None
    max_loras: Positive = 8
    batch: Positive = 32
    workers: Positive = 8
    timeout: float = Field(default=600.0, gt=0)
    start_timeout: float = Field(default=1200.0, gt=0)
    retries: int = Field(default=4, ge=0)


class EngineConfig(Section):
    """What generates. memory_gb bounds the caches of one batch; None leaves it to the engine.

    backend is the batched engine's. An engine beyond it has a section of its own.
    """

    name: Literal["batched", "vllm", "sglang"] = "batched"
    backend: Literal["auto", "native", "torch"] = "auto"
    memory_gb: float | None = Field(default=None, gt=0)
    vllm: VllmConfig | None = None
    sglang: SglangConfig | None = None

    @model_validator(mode="after")
    def _of_this_engine(self) -> EngineConfig:
        for section in ("vllm", "sglang"):
            if getattr(self, section) is not None and self.name != section:
                raise ValueError(f"{section} is the section of another engine than {self.name!r}")
        if self.backend != "auto" and self.name != "batched":
            raise ValueError(f"backend is an option of the batched engine, not of {self.name!r}")
        if self.memory_gb is not None and self.name == "sglang":
            raise ValueError("memory_gb: SGLang's memory is set by its own args")
        return self


class CommonConfig(Section):
    """What every kind of run says."""

    kind: str
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str = Field(min_length=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)
    threads: Positive | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every default written out: what `config.yaml` of a run holds."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Hex digest of the resolved values: equal exactly when the runs asked for are equal."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return blake2b(text.encode(), digest_size=16).hexdigest()
