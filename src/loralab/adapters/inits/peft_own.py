"""PEFT's own initialisations, on an adapter that is there already, with their data step run.

PEFT runs them while it makes the layers, some after a preparation of the bare model. Here the same
code runs on the finished PEFT model: its layers' methods, and its preparations pointed at the base
layers inside. What they take out of W is remembered (`loralab.adapters.true_base`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from pydantic import Field
from torch import Tensor

from loralab.adapters.inits.base import Facts
from loralab.adapters.inits.scene import Scene, Site
from loralab.adapters.true_base import memory_of, remember
from loralab.errors import UserError

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Pissa:
    """W's r largest singular triples go into the adapter, the rest stays frozen.

    niter: None for an exact SVD, else a randomised one with that many subspace iterations.
    """

    facts: ClassVar = Facts(
        formula="s·BA = the r largest singular triples of W; W ← W − s·BA",
        source="PiSSA, Meng et al. 2024, arXiv:2404.02948 (PEFT's code)",
        unchanged="to rounding of W − s·BA",
        cost="an SVD a module",
        needs="an unquantised base",
        quantized=False,
        changes_base=True,
    )
    niter: Count | None = None

    def apply(self, scene: Scene) -> Mapping[str, float]:
        name = "pissa" if self.niter is None else f"pissa_niter_{self.niter}"
        for site in scene.sites:
            with _split(site), _seeded(scene, site):
                site.layer.pissa_init(site.adapter, name)
        _mark(scene, name)
        return {}


@dataclass(frozen=True)
class Olora:
    """The first r columns of W's QR decomposition go into the adapter."""

    facts: ClassVar = Facts(
        formula="W = QR, s·BA = s·Q[:, :r] R[:r]; W ← W − s·BA",
        source="OLoRA, Büyükakyüz 2024, arXiv:2406.01775 (PEFT's code)",
        unchanged="to rounding of W − s·BA",
        cost="a QR a module",
        needs="an unquantised base",
        quantized=False,
        changes_base=True,
    )

    def apply(self, scene: Scene) -> Mapping[str, float]:
        for site in scene.sites:
            with _split(site):
                # Its QR is of the stored matrix: Conv1D keeps W transposed.
                if site.layer.fan_in_fan_out:
                    raise UserError(
                        f"olora: {site.name} is a Conv1D, which PEFT does not transpose"
                    )
                site.layer.olora_init(site.adapter)
        _mark(scene, "olora")
        return {}


@dataclass(frozen=True)
class Gaussian:
    """A ~ N(0, 1/r^2), B = 0."""

    facts: ClassVar = Facts(
        formula="A ~ N(0, 1/r²), B = 0",
        source="PEFT, init_lora_weights='gaussian'",
        unchanged="exactly",
        cost="none",
        needs="nothing",
    )

    def apply(self, scene: Scene) -> Mapping[str, float]:
        for site in scene.sites:
            with _seeded(scene, site):
                site.layer.reset_lora_parameters(site.adapter, "gaussian")
        _mark(scene, "gaussian")
        return {}


@dataclass(frozen=True)
class Mica:
    """B = the r smallest left singular vectors of W, frozen; A = 0 learns alone."""

    facts: ClassVar = Facts(
        formula="B = U[:, −r:] of W, frozen; A = 0",
        source="MiCA, arXiv:2604.01694 (PEFT's code)",
        unchanged="exactly",
        cost="an SVD a module",
        needs="an unquantised base",
        quantized=False,
    )

    def apply(self, scene: Scene) -> Mapping[str, float]:
        for site in scene.sites:
            with _types_kept(site):
                site.layer.mica_init(site.adapter)
            # PEFT looks here whenever it switches adapters on again, as after `disable_adapter()`.
            frozen = dict(site.layer.frozen_peft_weight_names)
            site.layer.frozen_peft_weight_names = {**frozen, site.adapter: ("lora_B",)}
            site.B.requires_grad_(False)
        _mark(scene, "mica")
        return {}


@dataclass(frozen=True)
class Eva:
    """The rows of A are the r main directions of the module's inputs, B = 0.

    rho: above 1, ranks move to the modules whose inputs need more directions (PEFT's default is 2);
        1 keeps every rank.
    """

    facts: ClassVar = Facts(
        formula="A = the r main directions of x by incremental PCA, B = 0",
        source="EVA, Paischer et al. 2024, arXiv:2410.07170 (PEFT's code)",
        unchanged="exactly",
        cost="passes over the text until the directions settle",
        needs="calibration text",
    )
    rho: Annotated[float, Field(ge=1)] = 1.0
    tau: Annotated[float, Field(gt=0, le=1)] = 0.99

    def apply(self, scene: Scene) -> Mapping[str, float]:
        from peft import initialize_lora_eva_weights

        ranks = {site.rank for site in scene.sites}
        shortest = min(row.shape[1] for row in scene.fitting_rows)
        if shortest < max(ranks):
            raise UserError(
                f"eva: a text has {shortest} tokens, fewer than the rank, {max(ranks)}; give longer"
            )
        config = scene.model.peft_config[scene.adapter]
        before, config.init_lora_weights = config.init_lora_weights, "eva"
        config.eva_config = EvaConfig(rho=self.rho, tau=self.tau)
        batches = [
            {"input_ids": row, "attention_mask": torch.ones_like(row)} for row in scene.fitting_rows
        ]
        was_training = scene.model.training
        scene.model.eval()
        try:
            initialize_lora_eva_weights(
                scene.model, batches, adapter_name=scene.adapter, show_progress_bar=False
            )
        except Exception:
            config.init_lora_weights = before
            raise
        finally:
            scene.model.train(was_training)
        return {}


@dataclass(frozen=True)
class Corda:
    """W's singular triples as weighed by the inputs go into the adapter.

    method: "ipm" takes the r largest (faster learning), "kpm" the r smallest (less forgetting).
    """

    facts: ClassVar = Facts(
        formula="SVD of W·C, C = E[xxᵀ]; s·BA = r of its triples, times C⁻¹; W ← W − s·BA",
        source="CorDA, Yang et al. 2024, arXiv:2406.05223 (PEFT's code)",
        unchanged="to rounding of W − s·BA",
        cost="one pass over the text, an inverse and an SVD a module",
        needs="calibration text, an unquantised base",
        quantized=False,
        changes_base=True,
    )
    method: Literal["ipm", "kpm"] = "ipm"

    def apply(self, scene: Scene) -> Mapping[str, float]:
        from peft.tuners.lora.corda import preprocess_corda

        config = _pointed_at_bases(scene)
        config.corda_config = CordaConfig(corda_method=self.method)
        rows = scene.fitting_rows

        def run() -> None:
            for row in rows:
                scene.model(input_ids=row, use_cache=False)

        with _base_kept(scene), scene.model.disable_adapter():
            preprocess_corda(scene.model.get_base_model(), config, run)
        for site in scene.sites:
            with _split(site):
                site.layer.corda_init(site.adapter, "corda")
        scene.model.peft_config[scene.adapter].corda_config = config.corda_config
        _mark(scene, "corda")
        return {}


@dataclass(frozen=True)
class LoraGA:
    """A and B from the singular vectors of the full gradient on the text.

    direction, scale, stable_gamma: as in PEFT's LoraGAConfig.
    """

    facts: ClassVar = Facts(
        formula="SVD of ∂L/∂W; A, B from its triples, r and r of them; W ← W − s·BA",
        source="LoRA-GA, Wang et al. 2024, arXiv:2407.05000 (PEFT's code)",
        unchanged="to rounding of W − s·BA",
        cost="a backward pass over the text with full gradients, an SVD a module",
        needs="calibration text, an unquantised base",
        quantized=False,
        changes_base=True,
    )
    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: Count = 16

    def apply(self, scene: Scene) -> Mapping[str, float]:
        from peft.tuners.lora.loraga import preprocess_loraga

        config = _pointed_at_bases(scene)
        config.lora_ga_config = LoraGAConfig(
            direction=self.direction, scale=self.scale, stable_gamma=self.stable_gamma
        )

        rows = scene.fitting_rows

        def step() -> None:
            for row in rows:
                scene.model(input_ids=row, labels=row, use_cache=False).loss.backward()

        with _base_kept(scene), scene.model.disable_adapter():
            preprocess_loraga(scene.model.get_base_model(), config, step)
        for site in scene.sites:
            with _split(site), _seeded(scene, site):
                site.layer.lora_ga_init(site.adapter, config.lora_ga_config)
        scene.model.peft_config[scene.adapter].lora_ga_config = config.lora_ga_config
        _mark(scene, "lora_ga")
        return {}


@contextmanager
def _split(site: Site) -> Iterator[None]:
    """Remember W before an initialisation that takes s B A out of it, and A0, B0 after."""
    remember(site.layer, site.adapter)
    with _types_kept(site):
        yield
    memory = memory_of(site.layer)
    assert memory is not None
    memory.A0, memory.B0 = _copy(site.A), _copy(site.B)


@contextmanager
def _types_kept(site: Site) -> Iterator[None]:
    """PEFT assigns `.data` of whatever type and layout its decomposition had.

    While it makes a model it casts adapters to fp32 afterwards; on a finished one nobody would.
    """
    dtypes = [parameter.dtype for parameter in (site.A, site.B)]
    yield
    for parameter, dtype in zip((site.A, site.B), dtypes, strict=True):
        parameter.data = parameter.data.to(dtype).contiguous()


@contextmanager
def _base_kept(scene: Scene) -> Iterator[None]:
    """Undo what PEFT's preparations leave on the base when the run they are given fails."""
    bases = [site.layer.get_base_layer() for site in scene.sites]
    wanted = [base.weight.requires_grad for base in bases]
    hooks = [(dict(base._forward_hooks), dict(base._backward_hooks)) for base in bases]
    was_training = scene.model.training
    try:
        yield
    finally:
        scene.model.train(was_training)
        for base, wants, (forward, backward) in zip(bases, wanted, hooks, strict=True):
            base.weight.requires_grad_(wants)
            base.weight.grad = None
            for now, before in ((base._forward_hooks, forward), (base._backward_hooks, backward)):
                for key in set(now) - set(before):
                    del now[key]


def _copy(factor: Tensor) -> Tensor:
    return factor.detach().to("cpu", torch.float32, copy=True)


@contextmanager
def _seeded(scene: Scene, site: Site) -> Iterator[None]:
    """PEFT draws from the global generator; give it the site's own stream."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(scene.generator(site.name).initial_seed())
        yield


def _pointed_at_bases(scene: Scene) -> Any:
    """A copy of the adapter's config whose targets are the base layers inside the PEFT layers."""
    config = copy.copy(scene.model.peft_config[scene.adapter])
    config.target_modules = {f"{site.name}.base_layer" for site in scene.sites}
    config.rank_pattern = {f"{site.name}.base_layer": site.rank for site in scene.sites}
    config.exclude_modules = config.layers_to_transform = None
    return config


def _mark(scene: Scene, name: str) -> None:
    """What PEFT itself would have in the config: its save and conversion look there."""
    scene.model.peft_config[scene.adapter].init_lora_weights = name
