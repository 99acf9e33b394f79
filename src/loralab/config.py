"""What a run is asked to do: YAML plus `key=value` overrides, checked against a frozen schema.

Everything a user can get wrong here (an unknown key, a wrong type, a missing file) becomes a
UserError of one line that names the file, the key, the value and what was expected. Adding a kind
of run is one more class with its own `kind` literal, one more row in `KINDS` and one more member
of `AnyConfig`.
"""

from __future__ import annotations

import copy
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from loralab.dialects import in_our_words
from loralab.errors import UserError
from loralab.yaml import parse_yaml

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Noise = Literal["B", "AB", "weights"]


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
    rank: Positive = 8
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


class GenerationConfig(Section):
    """How completions are sampled; temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    max_new_tokens: Positive = 64
    temperature: float = Field(default=0.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: Annotated[tuple[str, ...], Field(strict=False)] = ()


class EngineConfig(Section):
    """What generates. memory_gb bounds the caches of one batch; None leaves it to the engine."""

    name: Literal["batched"] = "batched"
    backend: Literal["auto", "native", "torch"] = "auto"
    memory_gb: float | None = Field(default=None, gt=0)


class TrainingConfig(Section):
    """Gradient training: `steps` updates of the weights, or `epochs` passes over the rows.

    An update sees batch_size * grad_accumulation rows, its loss a mean over their learned tokens.
    schedule: of the learning rate after the warm-up, down to 0 but for "constant". warmup: a
    number of steps, or below 1 a share of them. max_grad_norm: 0 is off. max_length: tokens; the
    rest of a row is cut off. optimizer: as Transformers names it (adamw_torch, adamw_8bit,
    adafactor ...). packing: rows share a batch place, up to max_length tokens, without seeing each
    other. fast: our step (the loss on learned tokens alone, no padding, fused LoRA) where the
    model allows it. save_every: steps between checkpoints, from which a killed run goes on.
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
    report_to: Annotated[tuple[str, ...], Field(strict=False)] = ()

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


class EvolveConfig(CommonConfig):
    """Evolve a LoRA adapter (or the weights themselves) on a task's reward."""

    kind: Literal["evolve"]
    task: TaskConfig
    adapter: AdapterConfig = AdapterConfig()
    evolution: EvolutionConfig
    generation: GenerationConfig = GenerationConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _searchable(self) -> EvolveConfig:
        adapter = self.adapter
        if adapter.type != "lora":
            raise ValueError(f"adapter.type: lora, the one that evolves (it is {adapter.type})")
        if adapter.dropout > 0:
            raise ValueError("adapter.dropout 0: nothing is dropped without gradients")
        if adapter.init.name == "progressive":
            raise ValueError("another adapter.init than progressive, which needs training steps")
        if self.evolution.noise_on == "weights" and adapter.init != InitConfig():
            raise ValueError("no adapter.init with noise_on: weights, which searches W itself")
        return self


class SftConfig(CommonConfig):
    """Supervised fine-tuning: learn a task's gold answers, or completions from a file.

    Either `task` or `data` gives the rows. `full: true` trains the model itself, without adapter.
    """

    kind: Literal["sft"]
    task: TaskConfig | None = None
    data: DataConfig | None = None
    adapter: AdapterConfig | None = AdapterConfig()
    full: bool = False
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    generation: GenerationConfig = GenerationConfig(max_new_tokens=256)

    @model_validator(mode="before")
    @classmethod
    def _no_adapter_in_full(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("full") is True:
            return {"adapter": None, **values}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> SftConfig:
        if (self.task is None) == (self.data is None):
            raise ValueError("either task or data, which say what to learn")
        if self.full == (self.adapter is not None):
            raise ValueError("either adapter or full: true")
        return self


PREVIOUS = "previous"


class VariantConfig(Section):
    """A run of an ablation: what it changes (dotted keys of the run's config) from another.

    after: the variant it starts from; null is `run` itself, left out is the variant before.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    says: str = ""
    after: str | None = PREVIOUS
    set: dict[str, Any] = Field(default_factory=dict)


class AblationConfig(CommonConfig):
    """The same fine-tuning with one thing changed at a time, each with several seeds.

    run: an `sft` config without kind, name, model, dtype, device, seed and threads, which are
    this config's own (`seed` is added to each of `seeds`).
    """

    kind: Literal["ablation"]
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = (0, 1, 2)
    run: dict[str, Any]
    variants: Annotated[tuple[VariantConfig, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _all_parse(self) -> AblationConfig:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError("variants with different names")
        for name in names:
            self.config_of(name, 0)
        return self

    def config_of(self, name: str, seed: int) -> SftConfig:
        """The config of one variant with one seed.

        Raises:
            ValueError: it is no valid `sft` config, or starts from a variant that is not there.
        """
        common = {k: getattr(self, k) for k in ("model", "dtype", "device", "threads")}
        values = {**copy.deepcopy(self.run), **common, "kind": "sft", "name": name}
        for variant in self._chain(name):
            for key, value in variant.set.items():
                _set(values, key.split("."), value)
        values["seed"] = self.seed + seed
        try:
            parsed = parse(values, f"variant {name}")
        except UserError as error:
            raise ValueError(f"a valid sft config for each variant: {error}") from None
        assert isinstance(parsed, SftConfig)
        return parsed

    def _chain(self, name: str) -> list[VariantConfig]:
        """The variants whose changes add up to the one named, first to last."""
        names = [variant.name for variant in self.variants]
        chain: list[VariantConfig] = []
        at: str | None = name
        while at is not None:
            if at not in names or len(chain) > len(names):
                raise ValueError(f"`after` to name another variant (it is {at!r})")
            place = names.index(at)
            variant = self.variants[place]
            chain.insert(0, variant)
            before = names[place - 1] if place else None
            at = before if variant.after == PREVIOUS else variant.after
        return chain


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        inner = values.get(key)
        values[key] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        values = inner
    values[path[-1]] = value


EXPECTED = {
    "model_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text (in quotes if it looks like a number)",
    "bool_type": "true or false",
}
"""Pydantic's words for types, put as YAML has them."""

AnyConfig = EvolveConfig | SftConfig | AblationConfig
KINDS: Mapping[str, type[EvolveConfig] | type[SftConfig] | type[AblationConfig]] = {
    "ablation": AblationConfig,
    "evolve": EvolveConfig,
    "sft": SftConfig,
}


def shipped() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    folder = Path(str(files("loralab") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def resolve(name_or_path: str | Path) -> Path:
    """A file as given, else the shipped config of that name. Raises UserError for neither."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = shipped()
    name = str(name_or_path).removesuffix(".yaml")
    if name in known:
        return known[name]
    if path.is_dir():
        raise UserError(f"{path}: is a directory; expected a YAML file")
    near = get_close_matches(path.stem, known, n=1, cutoff=0.6)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(
        f"config {str(name_or_path)!r}: no such file, and not one of the shipped "
        f"{', '.join(known)}{hint}"
    )


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Read a config by path or shipped name, apply `a.b=value` overrides, and check it.

    Override values are YAML (`8`, `1e-4`, `true`, `null`, `[q_proj, v_proj]`, text). Raises
    UserError.
    """
    path = resolve(name_or_path)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text at byte {error.start}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {_shown(values)}; expected a mapping with a `kind`")
    overridden = [_override(values, text) for text in overrides]
    return parse(values, str(path), overridden)


def parse(values: Mapping[str, Any], source: str, overridden: Sequence[str] = ()) -> AnyConfig:
    """Check plain values. `source` and the `overridden` key paths tell errors where to point."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        source = "command line" if "kind" in overridden else source
        kinds = " or ".join(map(repr, KINDS))
        raise UserError(f"{source}: kind is {_shown(kind)}; expected {kinds}")
    schema = KINDS[kind]
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        known = list(_paths(schema))
        details = {_path(d, known): d for d in reversed(error.errors(include_url=False))}
        # A misspelt key also leaves its right spelling missing: the misspelling is the news.
        path = min(reversed(details), key=lambda p: details[p]["type"] != "extra_forbidden")
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        line = _explain(path, details[path], known, source, overridden)
        raise UserError(line + more) from None


def parse_evolve(values: Mapping[str, Any], source: str) -> EvolveConfig:
    """As `parse`, where only an evolution will do: what a journal holds."""
    parsed = parse(values, source)
    if not isinstance(parsed, EvolveConfig):
        raise UserError(f"{source}: kind is {_shown(parsed.kind)}; expected 'evolve'")
    return parsed


def _override(values: dict[str, Any], text: str) -> str:
    """Apply one `a.b=value` to nested dicts in place; the key path it set."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"override {text!r}: expected key=value, as in evolution.population=16")
    at: Any = values
    for depth, key in enumerate(keys[:-1]):
        if at.get(key) is None:
            at[key] = {}
        at = at[key]
        if not isinstance(at, dict):
            parent = ".".join(keys[: depth + 1])
            raise UserError(f"override {text!r}: {parent} is {_shown(at)}, which holds no keys")
    at[keys[-1]] = parse_yaml(value, f"override {text!r}")
    return ".".join(keys)


def _path(detail: ErrorDetails, known: Sequence[str]) -> str:
    """The key path a user wrote. Pydantic's location also names branches of unions and indices."""
    location = [str(part) for part in detail["loc"]]
    if detail["type"] in ("extra_forbidden", "missing") or location[:2] == ["task", "options"]:
        return ".".join(location)
    while len(location) > 1 and ".".join(location) not in known:
        location.pop()
    return ".".join(location)


def _explain(
    path: str, detail: ErrorDetails, known: Sequence[str], source: str, overridden: Sequence[str]
) -> str:
    kind, value = detail["type"], _shown(detail["input"])
    whole_section = kind == "value_error"
    if any(
        path == o or path.startswith(o + ".") or (whole_section and o.startswith(path + "."))
        for o in overridden
    ):
        source = "command line"
    if kind == "extra_forbidden":
        near = _nearest(path, known)
        hint = f"did you mean {near}?" if near else _siblings(path, known)
        return f"{source}: unknown key {path} (value {value}); {hint}"
    if kind == "missing":
        return f"{source}: {path} is missing; it has no default"
    if whole_section:
        where = f"{source}: {path}" if path else source
        return f"{where}: expected {detail['ctx']['error']}"
    if path == "adapter.target_modules":
        expected = '"all-linear" or a list of module names'
    else:
        expected = EXPECTED.get(kind) or detail["msg"].removeprefix("Input should be ")
    return f"{source}: {path} is {value}; expected {expected}"


def _nearest(path: str, known: Sequence[str]) -> str | None:
    """The known key a user most likely meant: a near sibling, else the same name elsewhere."""
    parent, _, name = path.rpartition(".")
    siblings = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == parent}
    near = get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return siblings[near[0]]
    names = {p.rpartition(".")[2]: p for p in reversed(known)}
    near = get_close_matches(name, names, n=1, cutoff=0.75)
    return names[near[0]] if near else None


def _siblings(path: str, known: Sequence[str]) -> str:
    parent = path.rpartition(".")[0]
    names = [p.rpartition(".")[2] for p in known if p.rpartition(".")[0] == parent]
    return f"known keys here: {', '.join(names)}"


def _paths(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key path of a schema, outermost first."""
    sections = []
    for name, field in schema.model_fields.items():
        yield prefix + name
        sections += [(name, section) for section in _sections(field.annotation)]
    for name, section in sections:
        yield from _paths(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (Union, types.UnionType):
        for branch in typing.get_args(annotation):
            yield from _sections(branch)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
