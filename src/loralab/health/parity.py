"""Is an adapter the same merged, and the same again when it is read from disk?

With B = 0 every fault hides, so both are asked of a copy whose factors and spline values are made
random first. Copies share the base's weights; a merge, which changes them, is made on a copy of
one layer at a time.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from loralab.adapters.nonlinear import NonlinearConfig
from loralab.health.weights import active_adapter, adapted_layers, own_tensors

if TYPE_CHECKING:
    from loralab.health.look import Look

_RELOADED = "loralab_reloaded"
_INPUTS = 8
_BEND = 0.2


class ParityProbe:
    """`parity.*` of the adapter of a look; {} of a model without one.

    parity.merge: the largest of ||merged - unmerged|| / ||unmerged - base|| on random inputs, in
    fp32, over two layers of each kind; absent where nothing can be merged. parity.reload: the
    largest relative difference of a tensor that was saved and loaded. parity.keys_missing,
    parity.keys_unexpected:
    how many of the adapter's tensors a file lacks, or has too many; of `missing` and `unexpected`
    where a file was read before (the doctor's), else of one that is written here.
    """

    name = "parity"
    measures = "merged = unmerged and saved = reloaded, factors and splines random; missing keys"
    cost = "two layers of each kind copied and run once, the adapter written and read once"

    def __init__(
        self, adapter: str | None = None, missing: int | None = None, unexpected: int | None = None
    ) -> None:
        self.adapter = adapter
        self._missing, self._unexpected = missing, unexpected

    def measure(self, look: Look) -> dict[str, float]:
        """Of the model as it is."""
        return self.measure_model(look.subject.model)

    def measure_model(self, model: nn.Module) -> dict[str, float]:
        """As `measure`, of a PEFT model."""
        adapter = self.adapter or active_adapter(model)
        if adapter is None:
            return {}
        values: dict[str, float] = {}
        merged = merge_difference(model, adapter)
        if merged is not None:
            values["parity.merge"] = merged
        reloaded = reload(model, adapter)
        if reloaded is not None:
            values |= reloaded
        for name, count in (("missing", self._missing), ("unexpected", self._unexpected)):
            if count is not None:
                values[f"parity.keys_{name}"] = float(count)
        return values


@torch.no_grad()
def merge_difference(model: nn.Module, adapter: str) -> float | None:
    """The largest relative difference that merging makes in a layer; None if none can be merged.

    Of layers that only their values tell apart, which are random here, the first and the last are
    merged.
    """
    config = model.peft_config[adapter]  # type: ignore[index]
    if isinstance(config, NonlinearConfig) and not config.mergeable:
        return None
    kinds: dict[Hashable, list[Any]] = {}
    for _, layer in adapted_layers(model, adapter):
        kinds.setdefault(_kind(layer, adapter), []).append(layer)
    worst: float | None = None
    with _own_random_numbers():
        chosen = [layer for kind in kinds.values() for layer in (kind[:1] + kind[1:][-1:])]
        for number, layer in enumerate(chosen):
            found = _layer_difference(layer, adapter, number)
            if found is not None:
                # max() loses a NaN that comes second.
                worst = found if worst is None or not worst >= found else worst
    return worst


def _kind(layer: Any, adapter: str) -> Hashable:
    """What a merge depends on beside values: code, shapes and settings."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    settings = {
        name: value[adapter]
        for name, value in vars(layer).items()
        if isinstance(value, dict) and isinstance(value.get(adapter), int | float | str)
    }
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    return (
        tuple(type(module) for module in layer.modules()),
        type(variant),
        None if weight is None else (tuple(weight.shape), weight.dtype),
        tuple((name, tuple(tensor.shape)) for name, tensor in own_tensors(layer, adapter)),
        tuple(sorted(settings.items())),
    )


def _layer_difference(layer: Any, adapter: str, seed: int) -> float | None:
    base = layer.get_base_layer()
    wide = getattr(base, "in_features", None) or getattr(base, "nx", None)
    weight = getattr(base, "weight", None)
    if wide is None or weight is None or not weight.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(seed)
    one = copy.deepcopy(layer).to(device="cpu", dtype=torch.float32).eval()
    # A fused forward put on the instance would be the original layer's.
    one.__dict__.pop("forward", None)
    if one.merged:
        one.unmerge()
    one.set_adapter([adapter])
    one._disable_adapters = False
    randomise(one, adapter, generator)
    x = torch.randn(_INPUTS, int(wide), generator=generator)
    before = one.get_base_layer()(x)
    unmerged = one(x)
    try:
        one.merge(adapter_names=[adapter])
    except NotImplementedError:
        return None
    difference = float((one(x) - unmerged).norm())
    size = float((unmerged - before).norm())
    return difference / size if size else difference


def reload(model: nn.Module, adapter: str) -> dict[str, float] | None:
    """`parity.reload` and the counts of a copy of the model, saved and loaded; None for types that
    act outside of layers (prompts)."""
    tensors = _tensors(model, adapter)
    if not tensors:
        return None
    with _own_random_numbers(), TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin: Any = _twin(model)
        generator = torch.Generator().manual_seed(0)
        for _, layer in adapted_layers(twin, adapter):
            randomise(layer, adapter, generator)
        twin.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False)
        where = Path(folder) if adapter == "default" else Path(folder) / adapter
        _without_start(where)
        twin.load_adapter(str(where), adapter_name=_RELOADED, low_cpu_mem_usage=False)
        saved, loaded = _tensors(twin, adapter), _tensors(twin, _RELOADED)
    differences = {
        name: _difference(tensor, loaded[name]) for name, tensor in saved.items() if name in loaded
    }
    missing = [name for name in saved if name not in loaded or differences[name] > 0]
    return {
        "parity.reload": max(differences.values(), default=1.0),
        "parity.keys_missing": float(len(missing)),
    }


@torch.no_grad()
def randomise(layer: Any, adapter: str, generator: torch.Generator) -> None:
    """Give every tensor of an adapter in a layer values of a usual size, none of them 0.

    Factors that are all zero get a size at which dW is a tenth of W; what has values is moved by a
    tenth of their size; splines are bent and scaled.
    """
    for name, tensor in own_tensors(layer, adapter):
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        if "spline" in name:
            tensor.add_(_BEND * noise)
        elif bool(tensor.any()) and bool(torch.isfinite(tensor).all()):
            size = tensor.float().square().mean().sqrt()
            tensor.add_((0.1 * size * noise.float()).to(tensor))
        else:
            tensor.copy_(_usual_size(layer, adapter, name) * noise)


def _usual_size(layer: Any, adapter: str, name: str) -> float:
    """Of the entries of a zero factor. s B A has entries of sqrt(r) s a b, W of w."""
    weight = layer.get_base_layer().weight
    if not isinstance(layer, LoraLayer) or not name.startswith("lora_B"):
        return 0.02
    a = layer.lora_A[adapter].weight.float()
    row = float(a.square().mean().sqrt()) * a.shape[0] ** 0.5 * abs(float(layer.scaling[adapter]))
    whole = float(weight.float().square().mean().sqrt()) if weight.is_floating_point() else 0.02
    return 0.1 * whole / row if row else 0.02


def _tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor.detach()
        for name, layer in adapted_layers(model, adapter)
        for part, tensor in own_tensors(layer, adapter)
    }


def _difference(saved: Tensor, loaded: Tensor) -> float:
    if saved.shape != loaded.shape:
        return 1.0
    size = float(saved.float().norm())
    gap = float((saved.float() - loaded.to(saved.device).float()).norm())
    return gap / size if size else gap


def _twin(model: nn.Module) -> nn.Module:
    """A copy with modules and adapters of its own; every other parameter shares its storage."""
    own = {
        id(tensor)
        for adapter in model.peft_config  # type: ignore[union-attr]
        for _, layer in adapted_layers(model, adapter)
        for _, tensor in own_tensors(layer, adapter)
    }
    shared: dict[int, Any] = {}
    for parameter in model.parameters():
        if id(parameter) not in own:
            held = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
            shared[id(parameter)] = held
    return copy.deepcopy(model, shared)


def _without_start(folder: Path) -> None:
    """PiSSA and its like would take their start out of the copy's weights again when loaded."""
    file = folder / "adapter_config.json"
    with suppress(OSError, ValueError):
        config = json.loads(file.read_text())
        if isinstance(config, Mapping) and "init_lora_weights" in config:
            file.write_text(json.dumps({**config, "init_lora_weights": True}))


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
