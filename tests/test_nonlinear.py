"""One suite of behaviours over every nonlinear adapter: what PEFT promises of LoRA holds for it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tiny
from nonlinear_models import (
    adapted,
    config,
    every,
    logits,
    randomise,
    tokens,
)


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


@every
def test_a_reloaded_adapter_is_trained_only_if_asked_for(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    owned = {name for name, p in model.named_parameters() if p.requires_grad}
    for trainable in (False, True):
        again = PeftModel.from_pretrained(tiny.model("llama"), tmp_path, is_trainable=trainable)
        learned = {name for name, p in again.named_parameters() if p.requires_grad}
        assert learned == (owned if trainable else set())
    before = {name: p.detach().clone() for name, p in again.named_parameters()}
    optimizer = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.1)
    again(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    moved = {name for name, p in again.named_parameters() if not torch.equal(p, before[name])}
    assert moved == owned


@every
def test_a_resized_vocabulary_is_saved_beside_the_adapter(kind: str, tmp_path: Path) -> None:
    def resized() -> Any:
        base = tiny.model("llama")
        base.resize_token_embeddings(tiny.VOCABULARY + 9, mean_resizing=False)
        return base

    model = get_peft_model(resized(), config(kind))
    randomise(model)
    ids = torch.full((1, 3), tiny.VOCABULARY + 4)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    again = PeftModel.from_pretrained(resized(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert again(input_ids=ids).logits.shape[-1] == tiny.VOCABULARY + 9


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
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


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


@every
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian", False])
def test_takes_the_initialisations_of_plain_lora(kind: str, init: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        tiny.model("llama"), config(kind, init_lora_weights=init, target_modules=["q_proj"])
    ).eval()
    assert torch.isfinite(logits(model)).all()
