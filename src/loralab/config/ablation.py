"""`kind: ablation`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from loralab.config.explain import explained
from loralab.config.sections import CommonConfig, Section
from loralab.config.training import SftConfig

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
    this config's own (`seed` is added to each of `seeds`). Its guard is off unless it is written
    out, as its looks would take a good part of such short runs; its seconds are then in theirs.
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
        values = {"guard": None, **copy.deepcopy(self.run), **common, "kind": "sft", "name": name}
        for variant in self._chain(name):
            for key, value in variant.set.items():
                _set(values, key.split("."), value)
        values["seed"] = self.seed + seed
        try:
            return SftConfig.model_validate(values)
        except ValidationError as error:
            why = explained(error, SftConfig, f"variant {name}")
            raise ValueError(f"a valid sft config for each variant: {why}") from None

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
