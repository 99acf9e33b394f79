"""`loralab export` of adapters that are not linear in B A: exact in merged weights, else fitted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

import tiny
from export_cases import adapted, far, load, logits, save
from loralab import cli, examine
from loralab.adapters import LSLoraConfig, SineLoraConfig
from loralab.errors import UserError
from loralab.export import FITTED_ON, PROMPTS, export

SINE = SineLoraConfig(
    r=4,
    lora_alpha=6,
    target_modules="all-linear",
    sinelora_frequency=60.0,
    sinelora_scaling=9.0,
    task_type="CAUSAL_LM",
)
WEIGHT_SPLINE = LSLoraConfig(
    r=4, lora_alpha=6, target_modules="all-linear", space="weight", task_type="CAUSAL_LM"
)
SPLINE = LSLoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def base(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(model, tmp_path_factory.mktemp("base"))


def nonlinear(model: Any, config: Any, path: Path) -> Any:
    """A saved PEFT model with every parameter of a nonlinear adapter random."""
    made = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            spline = "lora_spline" in name
            parameter.data = parameter.data + noise if spline else noise
    made.save_pretrained(path)
    return made.eval()


@pytest.mark.parametrize("config", [SINE, WEIGHT_SPLINE], ids=["sine", "weight spline"])
def test_nonlinear_weights_merge_exactly(
    model: Any, base: str, config: Any, tmp_path: Path
) -> None:
    made = nonlinear(model, copy.deepcopy(config), tmp_path / "adapter")
    export(tmp_path / "adapter", "merged", tmp_path / "merged", base)
    assert far(logits(load(tmp_path / "merged")), logits(made)) < 1e-4
    assert far(logits(made), logits(model)) > 0.1


@pytest.mark.parametrize("config", [SINE, WEIGHT_SPLINE, SPLINE], ids=["sine", "weight", "spline"])
@pytest.mark.parametrize("to", ["peft", "mlx", "gguf"])
def test_nonlinear_needs_approximate(
    model: Any, base: str, config: Any, to: str, tmp_path: Path
) -> None:
    nonlinear(model, copy.deepcopy(config), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"not linear in B A.*--approximate"):
        export(tmp_path / "adapter", to, tmp_path / "made.gguf", base)
    assert not (tmp_path / "made.gguf").exists()


@torch.no_grad()
def divergence(original: Any, other: Any) -> float:
    """KL(original || other) in nats, over all tokens of the export's prompts."""
    rows = []
    for text in PROMPTS:
        ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
        p, q = (torch.distributions.Categorical(logits=m(ids).logits[0]) for m in (original, other))
        rows.append(torch.distributions.kl_divergence(p, q))
    return float(torch.cat(rows).mean())


def test_sine_at_full_rank_is_exact_and_at_low_rank_says_the_error(
    model: Any, base: str, tmp_path: Path
) -> None:
    made = nonlinear(model, copy.deepcopy(SINE), tmp_path / "adapter")
    full = export(tmp_path / "adapter", "peft", tmp_path / "full", base, 64, approximate=True)
    assert far(adapted(model, tmp_path / "full"), logits(made)) < 1e-3
    assert full.fidelity["kl"] < 1e-6
    low = export(tmp_path / "adapter", "peft", tmp_path / "low", base, 8, approximate=True)
    reduced = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "low").eval()
    assert low.fidelity["kl"] == pytest.approx(divergence(made, reduced), rel=1e-2)
    assert low.fidelity["kl"] > 1e-3
    kept = low.fidelity["energy"]["model.layers.0.self_attn.q_proj"]
    layer = made.base_model.model.model.layers[0].self_attn.q_proj
    values = torch.linalg.svdvals(layer.get_delta_weight("default")).square()
    assert kept == pytest.approx(float(values[:8].sum() / values.sum()), rel=1e-4)
    written = json.loads((tmp_path / "low" / "fidelity.json").read_text())
    assert written == json.loads(json.dumps(low.fidelity))
    assert any("KL from the original" in line for line in low.lines)


def test_identity_spline_is_plain_lora(model: Any, base: str, tmp_path: Path) -> None:
    """v = k: the fitted gain is 1, times the two scales."""
    made = get_peft_model(copy.deepcopy(model), copy.deepcopy(SPLINE))
    for name, parameter in made.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape) * 0.15
        elif name.endswith("output_scale"):
            parameter.data.fill_(0.7)
    made.save_pretrained(tmp_path / "adapter")
    result = export(tmp_path / "adapter", "peft", tmp_path / "made", base, approximate=True)
    assert all(g == pytest.approx(0.7, rel=1e-5) for g in result.fidelity["gain"].values())
    assert result.fidelity["kl"] < 1e-6
    assert far(adapted(model, tmp_path / "made"), logits(made.eval())) < 1e-4


def test_bent_spline_loses_and_says_so(model: Any, base: str, tmp_path: Path) -> None:
    made = nonlinear(model, copy.deepcopy(SPLINE), tmp_path / "adapter")
    result = export(tmp_path / "adapter", "peft", tmp_path / "made", base, approximate=True)
    assert result.fidelity["kl"] > 1e-4
    assert all(0 < error < 1 for error in result.fidelity["error"].values())
    assert far(adapted(model, tmp_path / "made"), logits(made)) < far(logits(model), logits(made))


@torch.no_grad()
def test_a_splines_gain_is_its_least_squares_slope(model: Any, base: str, tmp_path: Path) -> None:
    """Against a regression on what the layer's own input gives."""
    made = nonlinear(model, copy.deepcopy(SPLINE), tmp_path / "adapter")
    name = "model.layers.1.mlp.gate_proj"
    layer = made.base_model.model.get_submodule(name)
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    for text in FITTED_ON:
        made(torch.tensor([tiny.tokenizer()(text)["input_ids"]]))
    handle.remove()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    z = torch.cat(inputs) @ a.t() @ b.t() * 1.5
    f = layer.lora_spline["default"](z)
    slope = torch.linalg.lstsq(z.reshape(-1, 1).double(), f.reshape(-1, 1).double()).solution
    result = export(tmp_path / "adapter", "peft", tmp_path / "made", base, approximate=True)
    assert result.fidelity["gain"][name] == pytest.approx(float(slope), rel=1e-4)
    residual = float((f - float(slope) * z).norm() / f.norm())
    assert result.fidelity["error"][name] == pytest.approx(residual, rel=1e-3)


def test_hostile_nonlinear_configs_are_refused(model: Any, base: str, tmp_path: Path) -> None:
    nonlinear(model, copy.deepcopy(SPLINE), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, said in [
        ({"num_knots": 10**9}, "num_knots"),
        ({"num_knots": 7}, "expected \\(7,\\)"),
        ({"space": ["weight"]}, "expected a word"),
        ({"k_min": float("nan")}, "finite"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ]:
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=said):
            export(tmp_path, "peft", tmp_path / "made", base, approximate=True)
    # What PEFT would import or match is not even read.
    harmless = {"target_modules": "(a+)+$", "megatron_config": {"a": 1}, "megatron_core": "os"}
    path.write_text(json.dumps({**config, **harmless}))
    export(tmp_path, "peft", tmp_path / "made", base, approximate=True)


def test_the_command_has_the_doctor_look_at_what_was_approximated(
    model: Any, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nonlinear(model, copy.deepcopy(SINE), tmp_path / "adapter")
    words = ["export", str(tmp_path / "adapter"), "--base", base, "--to", "peft"]
    with pytest.MonkeyPatch.context() as patch:
        looked: list[tuple[Any, ...]] = []
        patch.setattr(examine, "doctor", lambda *given: looked.append(given) or "SOUND")
        assert cli.main([*words, "--output", str(tmp_path / "made"), "--approximate"]) == 0
    assert looked == [(str(tmp_path / "made"), base)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "SOUND"
    assert any(line.startswith("approximated: KL") for line in lines)
