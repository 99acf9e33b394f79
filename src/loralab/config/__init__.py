"""What a run is asked to do: YAML plus `key=value` overrides, checked against a frozen schema.

Everything a user can get wrong here (an unknown key, a wrong type, a missing file) becomes a
UserError of one line that names the file, the key, the value and what was expected. Adding a kind
of run is one more class with its own `kind` literal, one more row in `KINDS` and one more member
of `AnyConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loralab.config.ablation import AblationConfig, VariantConfig
from loralab.config.classify import ClassifyConfig
from loralab.config.distill import DistillConfig
from loralab.config.dpo import DpoConfig
from loralab.config.evolve import (
    EvolutionConfig,
    EvolveConfig,
    Noise,
    OptimizerConfig,
    ScaleConfig,
    ScheduleConfig,
)
from loralab.config.explain import explained, shown
from loralab.config.grpo import GrpoConfig
from loralab.config.measure import EvalConfig, MeasureConfig, ModelConfig
from loralab.config.pipeline import PipelineConfig
from loralab.config.pretrain import PretrainConfig
from loralab.config.sections import (
    AdapterConfig,
    CommonConfig,
    EngineConfig,
    GenerationConfig,
    InitConfig,
    Section,
    SglangConfig,
    TaskConfig,
    VllmConfig,
)
from loralab.config.seq2seq import Seq2SeqConfig
from loralab.config.training import DataConfig, EvaluationConfig, SftConfig, TrainingConfig
from loralab.config.verifier import VerifierConfig
from loralab.errors import UserError
from loralab.yaml import parse_yaml

__all__ = [
    "KINDS",
    "AblationConfig",
    "AdapterConfig",
    "AnyConfig",
    "ClassifyConfig",
    "CommonConfig",
    "DataConfig",
    "DistillConfig",
    "DpoConfig",
    "EngineConfig",
    "EvalConfig",
    "EvaluationConfig",
    "EvolutionConfig",
    "EvolveConfig",
    "GenerationConfig",
    "GrpoConfig",
    "InitConfig",
    "MeasureConfig",
    "ModelConfig",
    "Noise",
    "OptimizerConfig",
    "PipelineConfig",
    "PretrainConfig",
    "ScaleConfig",
    "ScheduleConfig",
    "Section",
    "Seq2SeqConfig",
    "SftConfig",
    "SglangConfig",
    "TaskConfig",
    "TrainingConfig",
    "VariantConfig",
    "VerifierConfig",
    "VllmConfig",
    "load",
    "parse",
    "parse_evolve",
    "read",
    "resolve",
    "shipped",
]

AnyConfig = (
    EvolveConfig
    | SftConfig
    | AblationConfig
    | PretrainConfig
    | DpoConfig
    | GrpoConfig
    | ClassifyConfig
    | Seq2SeqConfig
    | VerifierConfig
    | DistillConfig
    | EvalConfig
    | PipelineConfig
)
KINDS: Mapping[str, type[AnyConfig]] = {
    "ablation": AblationConfig,
    "classify": ClassifyConfig,
    "distill": DistillConfig,
    "dpo": DpoConfig,
    "eval": EvalConfig,
    "evolve": EvolveConfig,
    "grpo": GrpoConfig,
    "pipeline": PipelineConfig,
    "pretrain": PretrainConfig,
    "seq2seq": Seq2SeqConfig,
    "sft": SftConfig,
    "verifier": VerifierConfig,
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
    values = read(name_or_path)
    path = resolve(name_or_path)
    overridden = [_override(values, text) for text in overrides]
    return parse(values, str(path), overridden)


def read(name_or_path: str | Path) -> dict[str, Any]:
    """The values of a config by path or shipped name, not yet checked. Raises UserError."""
    path = resolve(name_or_path)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text at byte {error.start}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {shown(values)}; expected a mapping with a `kind`")
    return values


def parse(values: Mapping[str, Any], source: str, overridden: Sequence[str] = ()) -> AnyConfig:
    """Check plain values. `source` and the `overridden` key paths tell errors where to point."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        source = "command line" if "kind" in overridden else source
        kinds = " or ".join(map(repr, KINDS))
        raise UserError(f"{source}: kind is {shown(kind)}; expected {kinds}")
    schema = KINDS[kind]
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(explained(error, schema, source, overridden)) from None


def parse_evolve(values: Mapping[str, Any], source: str) -> EvolveConfig:
    """As `parse`, where only an evolution will do: what a journal holds."""
    parsed = parse(values, source)
    if not isinstance(parsed, EvolveConfig):
        raise UserError(f"{source}: kind is {shown(parsed.kind)}; expected 'evolve'")
    return parsed


def _override(values: dict[str, Any], text: str) -> str:
    """Apply one `a.b=value` to nested dicts and lists in place; the key path it set."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"override {text!r}: expected key=value, as in evolution.population=16")
    at: Any = values
    for depth, key in enumerate(keys):
        place: Any = key
        if isinstance(at, list) and key.isdecimal() and int(key) < len(at):
            place = int(key)
        elif not isinstance(at, dict):
            parent = ".".join(keys[:depth])
            raise UserError(f"override {text!r}: {parent} is {shown(at)}, which holds no {key}")
        if depth == len(keys) - 1:
            at[place] = parse_yaml(value, f"override {text!r}")
        elif isinstance(at, dict) and at.get(place) is None:
            at[place] = {}
        at = at[place]
    return ".".join(keys)
