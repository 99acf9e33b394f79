"""`kind: evolve`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from loralab.config.sections import (
    AdapterConfig,
    CommonConfig,
    EngineConfig,
    Fraction,
    GenerationConfig,
    GuardConfig,
    InitConfig,
    Positive,
    Section,
    TaskConfig,
)

Noise = Literal["B", "AB", "weights"]


class OptimizerConfig(Section):
    """`lr` is in units of each tensor's own noise sigma, so that 1 means one sigma's step."""

    name: Literal["sgd", "momentum", "adam"] = "sgd"
    lr: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)


class ScheduleConfig(Section):
    """A multiplier that goes from 1 at the first generation to `final` at the last."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    final: float = Field(default=0.1, ge=0)


class ScaleConfig(Section):
    """Size of the perturbation of W, as a fraction of the magnitude of W.

    init_scale multiplies it in generation 0, perturb_scale in every later one.
    """

    granularity: Literal["module", "layer"] = "module"
    statistic: Literal["mean", "median", "rms"] = "mean"
    fraction: float = Field(default=0.1, gt=0)
    init_scale: float = Field(default=1.0, gt=0)
    perturb_scale: float = Field(default=1.0, gt=0)


class EvolutionConfig(Section):
    """An evolution strategy: `population` members in each of `generations` generations.

    samples_per_generation walks the training set in windows of that size; test_samples is a fixed,
    seeded subset of the test set, scored every `eval_every` generations. None means all of them.
    """

    generations: Positive
    population: int = Field(ge=2)
    antithetic: bool = True
    noise_on: Noise = "B"
    noise_rank: Positive = 1
    shaping: Literal["raw", "zscore", "centered_rank"] = "zscore"
    per_prompt_baseline: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    weight_decay: Fraction = 0.0
    sigma_schedule: ScheduleConfig = ScheduleConfig()
    lr_schedule: ScheduleConfig = ScheduleConfig()
    scale: ScaleConfig = ScaleConfig()
    samples_per_generation: Positive | None = None
    test_samples: Positive | None = None
    eval_every: Positive = 10

    @model_validator(mode="after")
    def _pairs_need_two(self) -> EvolutionConfig:
        if self.antithetic and self.population % 2:
            raise ValueError(
                f"an even population with antithetic pairs, or antithetic: false (population is "
                f"{self.population})"
            )
        return self


class ScoringConfig(Section):
    """Where completions are scored, and when too many cannot be.

    `scoring: null` scores in this process, on a cluster as with the defaults. deadline: seconds for
    one completion, in `workers` processes that a reward which hangs does not outlive. max_failed:
    the run stops when more of a generation's completions could not be generated or scored.
    """

    deadline: float = Field(default=60.0, gt=0)
    workers: Positive = 1
    max_failed: Fraction = 1.0


class ClusterConfig(Section):
    """One actor a device, each with its own engine, on the machines of a Ray cluster.

    address: null starts Ray on this machine, "auto" joins the one that runs here, else host:port.
    actors: null starts as many as fit. pairs_per_unit: antithetic pairs (draws, without pairs) that
    an actor is handed and generates for at a time: small ones let no actor wait for another, large
    ones fill a device. A unit's answers depend on it alone, so it cannot change within a run, and
    the number of actors can. restarts: of one actor that died. start_seconds: how long the run
    waits while no actor is there at all.
    """

    name: Literal["ray"] = "ray"
    address: str | None = Field(default=None, min_length=1)
    actors: Positive | None = None
    cpus_per_actor: Positive = 1
    gpus_per_actor: float = Field(default=0.0, ge=0)
    pairs_per_unit: Positive = 1
    restarts: int = Field(default=10, ge=0)
    start_seconds: float = Field(default=600.0, gt=0)


class EvolveConfig(CommonConfig):
    """Evolve a LoRA adapter (or the weights themselves) on a task's reward."""

    kind: Literal["evolve"]
    task: TaskConfig
    adapter: AdapterConfig = AdapterConfig()
    evolution: EvolutionConfig
    generation: GenerationConfig = GenerationConfig()
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig | None = GuardConfig()
    scoring: ScoringConfig | None = None
    cluster: ClusterConfig | None = None

    @model_validator(mode="after")
    def _searchable(self) -> EvolveConfig:
        adapter = self.adapter
        if adapter.type != "lora":
            raise ValueError(f"adapter.type: lora, the one that evolves (it is {adapter.type})")
        if adapter.dropout > 0:
            raise ValueError("adapter.dropout 0: nothing is dropped without gradients")
        if adapter.init.name == "progressive":
            raise ValueError("another adapter.init than progressive, which needs training steps")
        if self.guard is not None and self.guard.action == "rollback":
            raise ValueError("guard.action: warn or stop; the best point is kept in any case")
        if self.cluster is not None and self.device == "cuda" and not self.cluster.gpus_per_actor:
            raise ValueError("cluster.gpus_per_actor above 0 with device: cuda")
        if self.evolution.noise_on == "weights" and adapter.init != InitConfig():
            raise ValueError("no adapter.init with noise_on: weights, which searches W itself")
        return self
