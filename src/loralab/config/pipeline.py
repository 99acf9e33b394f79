"""`kind: pipeline`: stages that read what earlier ones leave.

A stage is a config of any other kind. Where it has `config`, the shipped config of that name, or
the file, is what it changes: mappings are merged key by key, anything else is replaced, and a
mapping of numbers changes those elements of a list. The pipeline's own model, dtype, device, seed
and threads stand in stages that do not say theirs, also over those of a named config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from loralab.config.classify import ClassifyConfig
from loralab.config.distill import DistillConfig
from loralab.config.evolve import EvolveConfig
from loralab.config.pretrain import PretrainConfig
from loralab.config.references import STAGES, check, references, with_inputs
from loralab.config.sections import CommonConfig
from loralab.config.seq2seq import Seq2SeqConfig
from loralab.config.training import GradientConfig
from loralab.config.verifier import VerifierConfig
from loralab.errors import UserError

if TYPE_CHECKING:
    from loralab.config import AnyConfig

_SHARED = ("model", "dtype", "device", "seed", "threads")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


class PipelineConfig(CommonConfig):
    """Stages, run in their order.

    inputs: names for data that several stages read, written there as `inputs.NAME`. stages: by
    name; what an earlier one leaves is written `stages.NAME.model`, `.adapter` or `.data`.
    """

    kind: Literal["pipeline"]
    model: str = Field(default="smollm2", min_length=1)
    inputs: Mapping[str, str] = Field(default_factory=dict)
    stages: Mapping[str, Mapping[str, Any]] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _resolved(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get(STAGES), Mapping):
            return values
        inputs = values.get("inputs") or {}
        if not isinstance(inputs, Mapping):
            return values
        given = {key: values[key] for key in _SHARED if values.get(key) is not None}
        stages = {
            name: _stage(str(name), stage, given, inputs).to_dict()
            for name, stage in values[STAGES].items()
        }
        return {**values, STAGES: stages}

    @model_validator(mode="after")
    def _readable(self) -> PipelineConfig:
        parsed, earlier = self.parsed(), dict[str, frozenset[str]]()
        for name, stage in parsed.items():
            later = frozenset(set(parsed) - set(earlier))
            for reference in references(stage.to_dict(), f"stage {name}"):
                check(reference, f"stage {name}", earlier, later)
            earlier[name] = outputs(stage)
        return self

    def parsed(self) -> dict[str, AnyConfig]:
        """Each stage's config, references in it as they are written."""
        from loralab import config as configs

        return {name: configs.parse(s, f"stage {name}") for name, s in self.stages.items()}


def outputs(config: AnyConfig) -> frozenset[str]:
    """What a stage of this config leaves for others.

    model: trained whole, or its adapter merged into the base. adapter: in PEFT's format. data:
    rows for `kind: sft`. A classifier's, a summariser's and a verifier's are of use to no other
    kind.
    """
    match config:
        case PretrainConfig():
            return frozenset({"model"})
        case DistillConfig():
            return frozenset({"data"})
        case EvolveConfig():
            return frozenset({"adapter", "model"})
        case VerifierConfig() | ClassifyConfig() | Seq2SeqConfig():
            return frozenset()
        case GradientConfig():
            if config.adapter is None:
                return frozenset({"model"})
            if config.adapter.type == "lslora" and _on_activations(config.adapter.type_options):
                return frozenset({"adapter"})
            return frozenset({"adapter", "model"})
    return frozenset()


def _on_activations(options: Mapping[str, Any]) -> bool:
    """Whether no change of the weights does the same as this LS-LoRA."""
    return bool(options.get("space", "activation") == "activation")


def _stage(name: str, stage: Any, given: Mapping[str, Any], inputs: Mapping[str, str]) -> AnyConfig:
    from loralab import config as configs

    where = f"stage {name}"
    if not name or not set(name) <= _LETTERS or name.startswith("-"):
        raise UserError(f"{where}: expected a name of letters, digits, - and _")
    if not isinstance(stage, Mapping):
        raise UserError(f"{where}: expected a mapping with a `kind`, or with a `config` to change")
    own = dict(stage)
    base: dict[str, Any] = {}
    if "config" in own:
        named = own.pop("config")
        if not isinstance(named, str):
            raise UserError(f"{where}: config is {named!r}; expected a shipped name or a file")
        base = configs.read(named)
    kind = own.get("kind", base.get("kind"))
    if kind == "pipeline":
        raise UserError(f"{where}: kind is 'pipeline'; a pipeline holds no other one")
    common = {k: v for k, v in given.items() if not (k == "model" and kind == "pretrain")}
    values = merged({**base, **common, "name": name}, own)
    return configs.parse(with_inputs(values, inputs, where), where)


def merged(base: Any, change: Any) -> Any:
    """`base` with `change` laid over it; neither is altered."""
    if isinstance(base, Mapping) and isinstance(change, Mapping):
        both = {key: merged(base[key], value) for key, value in change.items() if key in base}
        return {**base, **change, **both}
    if isinstance(base, list) and isinstance(change, Mapping) and change:
        places = [int(key) for key in change if str(key).isdecimal() and int(key) < len(base)]
        if len(places) == len(change):
            made = list(base)
            for key, value in change.items():
                made[int(key)] = merged(made[int(key)], value)
            return made
    return change
