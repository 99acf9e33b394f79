"""One suite of behaviours over every nonlinear adapter: what PEFT promises of LoRA holds for it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tiny
from loralab.adapters import LSLoraConfig, SineLoraConfig
from loralab.errors import UserError

MAKE: dict[str, Callable[..., Any]] = {
    "spline": LSLoraConfig,
    "gated": lambda **kw: LSLoraConfig(gated=True, **kw),
    "clamp": lambda **kw: LSLoraConfig(boundary="clamp", num_knots=4, **kw),
    "weight": lambda **kw: LSLoraConfig(space="weight", k_min=-1.0, k_max=1.0, **kw),
    "sine": lambda **kw: SineLoraConfig(sinelora_frequency=3.0, **kw),
}
MERGEABLE = ("weight", "sine")
every = pytest.mark.parametrize("kind", MAKE)


def config(kind: str, **options: Any) -> Any:
    return MAKE[kind](
        **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | options
    )


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, adapter: str = "default") -> None:
    """Every parameter of the adapter off its start, B too: with B = 0 most faults hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (0.3 * noise).to(parameter.dtype)


def adapted(kind: str, base: str = "llama", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)  # PEFT draws A
    model = get_peft_model(tiny.model(base), config(kind, **options))
    randomise(model, seed)
    return model.eval()


def tokens(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(4, 67, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=tokens(), **kwargs).logits
    return out


def expected_change(kind: str, layer: Any, x: np.ndarray) -> np.ndarray:
    """What the adapter adds to a layer's output, from the formulas, in float64 with NumPy."""

    def array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().double().numpy()

    a, b = array(layer.lora_A["default"].weight), array(layer.lora_B["default"].weight)
    scaling = layer.lora_alpha["default"] / layer.r["default"]
    if kind == "sine":
        dw = scaling * np.sin(3.0 * b @ a) / sqrt(a.shape[1])
        return x @ dw.T
    own = layer.lora_spline["default"]
    v, i, o = array(own.values), own.input_scale.item(), own.output_scale.item()
    k = np.linspace(own.k_min, own.k_max, len(v))

    def phi(z: np.ndarray) -> np.ndarray:
        y = np.interp(z, k, v)
        if kind != "clamp":
            first, last = (v[1] - v[0]) / (k[1] - k[0]), (v[-1] - v[-2]) / (k[-1] - k[-2])
            y = np.where(z < k[0], v[0] + first * (z - k[0]), y)
            y = np.where(z > k[-1], v[-1] + last * (z - k[-1]), y)
        return o * y

    if kind == "weight":
        return x @ phi(i * scaling * b @ a).T
    z = scaling * x @ a.T @ b.T
    if kind == "gated":
        g = own.gate.item()
        return (1 - g) * z + g * phi(i * z)
    return phi(i * z)


@every
@pytest.mark.parametrize(("base", "name"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_follows_its_formula_on_linear_and_conv1d(kind: str, base: str, name: str) -> None:
    model = adapted(kind, base, target_modules=[name])
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    x = 2 * torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        change = layer(x) - layer.get_base_layer()(x)
    want = expected_change(kind, layer, x.double().numpy())
    assert np.abs(want).max() > 0.3
    np.testing.assert_allclose(change.double().numpy(), want, atol=2e-5 * np.abs(want).max())


@every
def test_starts_as_the_base_model(kind: str) -> None:
    base = tiny.model("llama")
    model = get_peft_model(copy.deepcopy(base), config(kind))
    if kind == "clamp":  # clamped z = 0 is still 0
        model.eval()
    assert torch.equal(logits(model), logits(base))


@every
def test_saves_every_parameter_and_reloads_exactly(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == ("SINELORA" if kind == "sine" else "LSLORA")
    owned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(owned)
    for lazy in (False, True):
        again = PeftModel.from_pretrained(
            tiny.model("llama"), tmp_path, low_cpu_mem_usage=lazy, adapter_name="other"
        )
        assert torch.equal(logits(again), logits(model))


def test_loads_in_a_fresh_process_that_only_imports_loralab_adapters(tmp_path: Path) -> None:
    model = adapted("gated")
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    code = (
        "import sys\n"
        "import loralab.adapters\n"
        "assert 'peft' not in sys.modules, 'importing loralab.adapters imported PEFT'\n"
        "from peft import PeftModel\n"
        "import tiny, torch\n"
        f"model = PeftModel.from_pretrained(tiny.model('llama'), {str(tmp_path)!r})\n"
        "assert type(model.base_model).__name__ == 'LSLoraModel'\n"
        "ids = torch.randint(4, 67, (3, 7), generator=torch.Generator().manual_seed(1))\n"
        f"want = torch.load({str(tmp_path / 'logits.pt')!r})\n"
        "assert torch.equal(model(input_ids=ids).logits, want)\n"
    )
    where = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": where}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@every
def test_several_adapters_are_switched_disabled_mixed_and_deleted(kind: str) -> None:
    base = tiny.model("llama")
    model = get_peft_model(copy.deepcopy(base), config(kind), adapter_name="one").eval()
    model.add_adapter("two", config(kind, r=2, target_modules=["q_proj", "up_proj"]))
    randomise(model, 1, "one")
    randomise(model, 2, "two")
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = logits(model)
        trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {name}
    assert (alone["one"] - alone["two"]).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    mixed = logits(model, adapter_names=["two", "__base__", "one"])
    for row, want in enumerate((alone["two"], logits(base), alone["one"])):
        torch.testing.assert_close(mixed[row], want[row], atol=1e-4, rtol=1e-4)
    model.delete_adapter("two")
    assert not any(".two." in name for name in model.state_dict())
    assert torch.equal(logits(model), alone["one"])


@every
def test_merging_gives_the_same_function_or_refuses_and_touches_nothing(kind: str) -> None:
    for base in ("llama", "gpt2"):
        model = adapted(kind, base)
        before, weights = logits(model), copy.deepcopy(model.state_dict())
        if kind not in MERGEABLE:
            layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
            for attempt in (
                model.merge_adapter,
                model.merge_and_unload,
                lambda layer=layer: layer.get_delta_weight("default"),
                layer.merge,
            ):
                with pytest.raises(UserError, match="cannot be merged: its spline acts"):
                    attempt()
            assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
            continue
        model.merge_adapter()
        torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model.state_dict(), weights, atol=1e-6, rtol=0)
        merged = model.merge_and_unload(safe_merge=True)
        assert not any(isinstance(m, LoraLayer) for m in merged.modules())
        torch.testing.assert_close(logits(merged), before, atol=2e-4, rtol=1e-4)


def test_a_refused_merge_leaves_no_adapter_half_merged() -> None:
    model = get_peft_model(tiny.model("llama"), config("weight", target_modules=["q_proj"]), "one")
    model.add_adapter("two", config("spline", target_modules=["down_proj"]))
    model.base_model.set_adapter(["one", "two"])
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UserError, match="adapter 'two' cannot be merged"):
            merge()
    assert not any(m.merged_adapters for m in model.modules() if isinstance(m, LoraLayer))
    assert any(isinstance(m, LoraLayer) for m in model.modules())
    model.merge_adapter(["one"])
    assert sum(m.merged for m in model.modules() if isinstance(m, LoraLayer)) == 2


@every
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_stays_near_full(kind: str, autocast: bool, tmp_path: Path) -> None:
    full = adapted(kind)
    full.save_pretrained(tmp_path)
    half = PeftModel.from_pretrained(
        tiny.model("llama", torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast
    ).eval()
    types = {p.dtype for name, p in half.named_parameters() if "lora_" in name}
    assert types == {torch.float32 if autocast else torch.bfloat16}
    pairs = zip(full.modules(), half.modules(), strict=True)
    before, after = next((f, h) for f, h in pairs if isinstance(f, LoraLayer))
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad():
        want = before(x.float()) - before.get_base_layer()(x.float())
        got = after(x).float() - after.get_base_layer()(x).float()
    assert logits(half).dtype == torch.bfloat16
    assert (got - want).norm() / want.norm() < 0.02


@every
def test_gradients_are_the_same_with_checkpointing_and_reach_every_parameter(kind: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(kind, lora_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(g is not None and g.abs().max() > 0 for g in grads.values())
        found.append(grads)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


@every
def test_rank_alpha_and_rslora_set_the_scaling(kind: str) -> None:
    model = adapted(kind, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5})
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            own = name.endswith("q_proj")
            assert layer.scaling["default"] == (5 / sqrt(2) if own else 6 / sqrt(4))
            assert layer.lora_A["default"].weight.shape[0] == (2 if own else 4)


@every
def test_dropout_applies_in_training_only(kind: str) -> None:
    model = adapted(kind, lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert (logits(model) - logits(model)).abs().max() > 0.1


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every width a multiple of 64, as the 4-bit kernel of bitsandbytes for CPUs wants it."""
    where = tmp_path_factory.mktemp("base")
    shape = tiny.CONFIGS["llama"]()
    shape.update({"intermediate_size": 128, "vocab_size": 128, "num_key_value_heads": 4})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(where)
    return where


@every
@pytest.mark.parametrize("bits", [4, 8])
def test_trains_on_a_quantised_base(kind: str, bits: int, saved_base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    base = AutoModelForCausalLM.from_pretrained(
        saved_base, quantization_config=quantised, device_map="cpu", dtype=torch.float32
    )
    base_logits = logits(base)
    model = get_peft_model(base, config(kind))
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    wanted = "Linear4bit" if bits == 4 else "Linear8bitLt"
    assert all(type(m).__name__.endswith(wanted) for m in layers)
    torch.testing.assert_close(logits(model), base_logits)
    randomise(model)
    layer = layers[0]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        change = layer(x) - layer.get_base_layer()(x)
    want = expected_change(kind, layer, x.double().numpy())
    np.testing.assert_allclose(change.double().numpy(), want, atol=0.02 * np.abs(want).max())

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@contextmanager
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@every
def test_data_parallel_training_needs_no_search_for_unused_parameters(kind: str) -> None:
    model = adapted(kind).train()
    with process_group():
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # an unused parameter is an error at the second pass
            parallel(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Several(nn.Module):
    """One of each layer that only plain LoRA can adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.linear = nn.Linear(4, 4)


@pytest.mark.parametrize("kind", ["spline", "sine"])
@pytest.mark.parametrize("target", ["embedding", "conv", "attention", "attention.out_proj"])
def test_refuses_layers_it_cannot_adapt(kind: str, target: str) -> None:
    with pytest.raises(UserError, match=rf"{target}: .*LORA cannot adapt a .*change target_mod"):
        get_peft_model(Several(), config(kind, target_modules=["linear", target], task_type=None))


@pytest.mark.parametrize("kind", ["spline", "sine"])
@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"target_parameters": ["linear.weight"]},
        {"init_lora_weights": "mica"},
        {"alora_invocation_tokens": [1, 2]},
        {"use_qalora": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_refuses_options_of_plain_lora_only(kind: str, option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(option))} is .* plain LoRA"):
        config(kind, **option)


@every
def test_refuses_weighted_sums_conversions_and_a_second_tuner(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    with pytest.raises(UserError, match="add_weighted_adapter: default are nonlinear"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(UserError, match="path_initial_model_for_weight_conversion"):
        model.base_model.subtract_mutated_init({}, "default")
    plain = get_peft_model(tiny.model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="q_proj: already holds an adapter of another type"):
        get_peft_model(plain.get_base_model(), config(kind, target_modules=["q_proj"]))


@every
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian", False])
def test_takes_the_initialisations_of_plain_lora(kind: str, init: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        tiny.model("llama"), config(kind, init_lora_weights=init, target_modules=["q_proj"])
    ).eval()
    assert torch.isfinite(logits(model)).all()
