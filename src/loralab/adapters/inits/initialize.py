"""`initialize(peft_model, "name", **options)`: start an adapter again, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import PeftModel

from loralab.adapters.inits.base import Context, InitStrategy, LoraInit, WholeModel
from loralab.adapters.inits.check import check
from loralab.adapters.inits.progressive import stop_rising
from loralab.adapters.inits.scene import Scene, Site
from loralab.adapters.inits.snapshot import Snapshot
from loralab.adapters.plain_lora import CHANGED_BASE
from loralab.adapters.true_base import base_changed, memory_of, owner, restore
from loralab.config import InitConfig
from loralab.errors import UserError
from loralab.registry import INITS


@dataclass(frozen=True)
class InitReport:
    """What an initialisation did.

    relative_size: ||s B A||_F / ||W||_F by module, W the true base's.
    figures: what it measured while it fitted, the mean over modules (see the class's docstring).
    by_module: the same by module.
    changed_base: whether a disabled adapter is not the base model any more.
    """

    name: str
    adapter: str
    relative_size: Mapping[str, float]
    figures: Mapping[str, float] = field(default_factory=dict)
    by_module: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    changed_base: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def initialize(
    model: PeftModel,
    name: str,
    *,
    adapter: str = "default",
    seed: int = 0,
    tokenizer: Any = None,
    texts: Sequence[str] | str | Path = (),
    max_tokens: int = 512,
    **options: Any,
) -> InitReport:
    """Set the factors of a PEFT model's adapter, in place.

    Args:
        model: what `peft.get_peft_model` returned, with a LoRA (or LSLORA, SINELORA) adapter.
        name: one of `loralab inits`; `options` are its keyword arguments.
        seed: every module draws from its own stream of (seed, module name).
        tokenizer, texts: for those that look at text. A path is a file with one text a line.
            A quarter of the texts is held out of the fit.
        max_tokens: of each text.

    An earlier initialisation of the same adapter is undone first: weights it changed come back, a
    scaling that was to rise is at its target, a B that was frozen learns again.

    Raises:
        UserError: an unknown name or option, something it needs is missing, or it cannot run on
            this model (a quantised base, a module that is not linear, a nonlinear adapter where
            it needs dW = s BA).

    After any error, and an interruption, the model is what it was before.

    Example:
        >>> initialize(model, "orthogonal", seed=1)  # doctest: +SKIP
    """
    strategy = INITS.create(name, options)
    scene = Scene(model, adapter, seed, tokenizer, _read(texts), max_tokens, asked_by=name)
    check(strategy.facts, name, scene.sites)
    if owner(model) not in (None, adapter):
        raise UserError(f"{name}: adapter {owner(model)!r} rests on weights it changed; delete it")
    config = model.peft_config[adapter]
    before = Snapshot(scene)
    by_module: dict[str, Mapping[str, float]] = {}
    try:
        _undo_earlier(scene)
        if isinstance(strategy, WholeModel):
            figures: Mapping[str, float] = strategy.apply(scene)
        else:
            by_module = _module_by_module(strategy, scene)
            figures = _means(by_module.values())
            if base_changed(model):
                # As PEFT marks its own: saved, the adapter must not pass for one of the base.
                config.init_lora_weights = name
    except BaseException:
        before.put_back()
        raise
    sizes = {site.name: _relative_size(site) for site in scene.sites}
    return InitReport(name, adapter, sizes, dict(figures), by_module, base_changed(model))


def options_of(init: InitConfig, texts: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of `initialize` from a config's `adapter.init`.

    texts: what the run would have it look at, unless the config names others.

    Raises:
        UserError: the config sets what the run itself gives.
    """
    for option in ("adapter", "model", "name", "seed", "tokenizer"):
        if option in init.options:
            raise UserError(
                f"adapter.init.options.{option} is {init.options[option]!r}; expected no such "
                "option: the run gives it, leave it out"
            )
    return {"texts": texts, **init.options}


def _undo_earlier(scene: Scene) -> None:
    """Weights back, scalings at their targets, B learning, and no mark of it in the config."""
    config = scene.model.peft_config[scene.adapter]
    mark = config.init_lora_weights
    ours = base_changed(scene.model)
    restore(scene.model)
    stop_rising(scene.model)
    if mark == "mica":
        for site in scene.sites:
            # As A: PEFT freezes both factors of an adapter that is not active.
            site.B.requires_grad_(site.A.requires_grad)
            frozen = site.layer.frozen_peft_weight_names
            site.layer.frozen_peft_weight_names = {
                adapter: names for adapter, names in frozen.items() if adapter != scene.adapter
            }
    # A base that PEFT itself changed stays changed, and the adapter must go on saying so.
    if ours or not (isinstance(mark, str) and mark.lower().startswith(CHANGED_BASE)):
        config.init_lora_weights = True


def _module_by_module(strategy: InitStrategy, scene: Scene) -> dict[str, Mapping[str, float]]:
    """Every start is made before the first is set: an error half-way changes nothing."""
    made: list[tuple[Site, LoraInit]] = []
    for site in scene.sites:
        init = strategy(site.weight(), site.rank, scene.generator(site.name), Context(site, scene))
        made.append((site, init))
    for site, init in made:
        site.set(init.A, init.B)
        if init.correction is not None:
            site.correct(init.correction)
    return {site.name: init.figures for site, init in made if init.figures}


def _means(figures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    rows = list(figures)
    return {key: fmean(row[key] for row in rows) for key in (rows[0] if rows else {})}


def _relative_size(site: Site) -> float:
    memory = memory_of(site.layer)
    weight = site.weight() if memory is None else memory.weight.float()
    change = (site.B.detach().float() @ site.A.detach().float()) * site.scaling
    return float(change.norm() / weight.norm().clamp_min(1e-30))


def _read(texts: Sequence[str] | str | Path) -> tuple[str, ...]:
    if isinstance(texts, str | Path):
        try:
            lines = Path(texts).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"texts: {texts}: {error.strerror}") from error
        return tuple(line for line in lines if line.strip())
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"texts is {texts!r:.60}; expected a list of texts, or a file of them")
    return tuple(texts)
