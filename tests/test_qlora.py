"""Adapters on quantised bases: gradients pass through them, and a run goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import tiny
from loralab import pipeline
from loralab.adapters.dense import dense_weight
from loralab.engines.native.backend import NativeBackend
from loralab.errors import UserError
from loralab.models.load import load
from loralab.run import Run
from test_sft import adapter_of, config_for, run_it, same_tensors, without_times
from test_sft import folder as rows_folder

pytest.importorskip("bitsandbytes")
assert rows_folder
BITS = ("nf4", "int8")


@pytest.fixture(scope="module")
def folder(rows_folder: Path) -> Path:
    """Rows, and a model of widths that bitsandbytes' CPU kernels take."""
    tiny.save_quantisable(rows_folder / "model")
    return rows_folder


def gradients(base: Any) -> dict[str, torch.Tensor]:
    """Of random factors, after the base has answered without gradients as an evaluation does."""
    ids = torch.randint(4, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base(input_ids=ids)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).train()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bits", BITS)
def test_gradients_pass_through_quantised_layers(folder: Path, bits: Any) -> None:
    quantised, _ = load(folder / "model", "float32", quantization=bits)
    dense, _ = load(folder / "model", "float32")
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = dense_weight(quantised.get_submodule(name))
    ours, wanted = gradients(quantised), gradients(dense)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # int8 rounds to float16 on its way.
        tolerance = 1e-4 if bits == "nf4" else 2e-2
        assert (ours[name] - gradient).norm() < tolerance * gradient.norm(), name


@pytest.mark.parametrize("nested", [False, True])
def test_the_dense_weight_of_reordered_nf4(folder: Path, nested: bool) -> None:
    """Where another program has loaded the model, and the processor has AVX512-BF16."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", quantization_config=config, device_map={"": "cpu"}
    )
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    before = dense_weight(layer)
    with torch.no_grad():
        layer.eval()(torch.randn(3, layer.in_features))
    tolerance = 2e-2 if nested else 4e-3
    torch.testing.assert_close(dense_weight(layer), before, rtol=tolerance, atol=tolerance / 4)


@pytest.mark.parametrize("bits", BITS)
def test_a_run_learns_saves_and_goes_on(folder: Path, tmp_path: Path, bits: str) -> None:
    training = {"steps": 12, "lr": 2e-2, "save_every": 4}
    config = config_for(folder, quantization=bits, dtype="bfloat16", training=training)
    whole, run = run_it(tmp_path / "whole", config)
    assert whole.complete
    assert sum(whole.losses[-3:]) < 0.9 * sum(whole.losses[:3])
    # The native kernels would read packed weights as if they were not.
    assert run.environment()["kernel"].startswith("torch")
    first, _ = run_it(tmp_path / "cut", config, stop_at=3)
    assert not first.complete
    last, cut = run_it(tmp_path / "cut", config)
    assert last.losses == whole.losses
    assert same_tensors(adapter_of(cut), adapter_of(run))
    assert without_times(cut) == without_times(run)


@pytest.mark.parametrize("bits", BITS)
def test_native_kernels_refuse_quantised_weights(folder: Path, bits: Any) -> None:
    model, _ = load(folder / "model", "bfloat16", quantization=bits)
    assert "quantised" in str(NativeBackend.supports(model))


def test_what_cannot_start_on_a_quantised_base_is_refused_before_training(
    folder: Path, tmp_path: Path
) -> None:
    config = config_for(folder, quantization="nf4", adapter={"init": {"name": "pissa"}})
    with pytest.raises(UserError, match="pissa cannot start on a quantised base"):
        pipeline.start(config, tmp_path / "run", lambda event: None)
    assert not any(row.get("loss") for row in Run.open(tmp_path / "run").metrics())
    with pytest.raises(UserError, match="quantised weights cannot be trained"):
        config_for(folder, quantization="int8", full=True, adapter=None)


def test_loftq_needs_a_quantised_base(folder: Path, tmp_path: Path) -> None:
    options = {"reference": str(folder / "model")}
    init = {"init": {"name": "loftq", "options": options}}
    with pytest.raises(UserError, match="set quantization: nf4"):
        run_it(tmp_path / "full", config_for(folder, adapter=init))
    config = config_for(folder, quantization="nf4", adapter=init, training={"steps": 2})
    done, run = run_it(tmp_path / "nf4", config)
    assert done.complete
    assert 0 < run.environment()["init"]["left"] < 1
