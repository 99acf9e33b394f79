"""LS-LoRA: the function, its start, the pull to the identity, the diagnostics."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

import tiny
from loralab.adapters import LSLoraConfig
from loralab.adapters.spline import (
    BEND,
    LoraSpline,
    knot_positions,
    soft_spline,
    spline,
)
from loralab.adapters.spline_diagnostics import (
    SplineDiagnosticsCallback,
    count_outside,
    spline_diagnostics,
    splines,
)
from loralab.adapters.spline_penalty import spline_regularizer
from loralab.errors import UserError


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(**options: Any) -> LSLoraConfig:
    return LSLoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | options
    )


def adapted(base: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(base or tiny.model("llama"), config(**options))
    randomise_b(model)
    return model.eval()


@torch.no_grad()
def randomise_b(model: Any) -> None:
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            parameter.copy_(normal(*parameter.shape, seed=index, scale=0.3))


@torch.no_grad()
def bend(model: Any, scale: float = 0.4) -> None:
    for index, own in enumerate(splines(model).values()):
        own.values += normal(*own.values.shape, seed=index, scale=scale)


IDS = torch.randint(4, 67, (4, 7), generator=torch.Generator().manual_seed(1))


def reference(z: np.ndarray, v: np.ndarray, low: float, high: float, boundary: str) -> np.ndarray:
    k = np.linspace(low, high, len(v))
    y = np.interp(z, k, v)
    if boundary == "extrapolate":
        step = k[1] - k[0]
        y = np.where(z < low, v[0] + (z - low) * (v[1] - v[0]) / step, y)
        y = np.where(z > high, v[-1] + (z - high) * (v[-1] - v[-2]) / step, y)
    return y


@pytest.mark.parametrize("boundary", ["extrapolate", "clamp"])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_function_matches_numpy(count: int, boundary: Any) -> None:
    low, high = -1.7, 2.9
    values = normal(count, seed=count, scale=2)
    z = torch.cat([normal(300, seed=9, scale=3), knot_positions(count, low, high)])
    want = reference(z.double().numpy(), values.double().numpy(), low, high, boundary)
    got = spline(z, values, low, high, boundary)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)


@pytest.mark.parametrize("boundary", ["extrapolate", "clamp"])
def test_function_has_the_right_gradients(boundary: Any) -> None:
    z = normal(40, seed=1, scale=3).double().requires_grad_()
    values = normal(5, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, v: spline(z, v, -3.0, 3.0, boundary), (z, values))


def test_function_keeps_nan() -> None:
    assert spline(torch.tensor([math.nan]), normal(5), -3.0, 3.0).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "low", "high"), [(5, -3.0, 3.0), (7, -1.1, 2.3)])
def test_identity_is_exact_everywhere(
    count: int, low: float, high: float, held: torch.dtype, dtype: torch.dtype
) -> None:
    z = torch.cat([normal(500, scale=10.0**power, seed=2) for power in (-6, -3, 0, 1, 3)])
    z = z.to(dtype)
    values = knot_positions(count, low, high).to(held)
    assert torch.equal(spline(z, values, low, high), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_starts_as_plain_lora_bit_for_bit(gated: bool, dtype: torch.dtype) -> None:
    base = tiny.model("llama", dtype)
    ours = adapted(copy.deepcopy(base), gated=gated)
    torch.manual_seed(0)
    plain = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    )
    plain.load_state_dict(ours.state_dict(), strict=False)
    want = plain(input_ids=IDS).logits
    with plain.disable_adapter():
        assert (want - plain(input_ids=IDS).logits).abs().max() > 0.5
    assert torch.equal(ours(input_ids=IDS).logits, want)


def test_clamp_loses_the_gradient_outside_the_grid_and_extrapolation_keeps_it() -> None:
    for boundary, slope in (("clamp", 0.0), ("extrapolate", 2.5)):
        z = torch.tensor([-9.0, 7.0], requires_grad=True)
        values = torch.tensor([-2.5, 0.0, 2.5])
        spline(z, values, -1.0, 1.0, boundary).sum().backward()  # type: ignore[arg-type]
        assert z.grad is not None
        assert z.grad.tolist() == [slope, slope]


def test_knot_gradients_from_bf16_inputs_are_those_of_fp32() -> None:
    z, upstream = normal(4096, 8, seed=3, scale=2).bfloat16(), normal(4096, 8, seed=4).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        values = (knot_positions(5, -3.0, 3.0) + normal(5, seed=5)).to(torch.float64)
        values = values.float() if dtype is torch.bfloat16 else values
        values.requires_grad_()
        spline(z.to(dtype), values, -3.0, 3.0).backward(upstream.to(dtype))
        assert values.grad is not None
        found.append(values.grad.double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("knots", [2, 5, 6, 7, 9])
def test_soft_interpolation_and_its_gradients_are_autograd_s(knots: int) -> None:
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(40, 2000, generator=generator, dtype=torch.float64)
    z[0, :4] = torch.tensor([-400.0, 400.0, -3.0, 3.0])
    values = torch.randn(knots, generator=generator, dtype=torch.float64)
    weight = torch.randn(z.shape, generator=generator, dtype=torch.float64)

    def reference(z: Tensor, values: Tensor) -> Tensor:
        grid = torch.linspace(-3, 3, knots, dtype=torch.float64)
        distance = (z.unsqueeze(-1) - grid) * ((knots - 1) / 6)
        return (torch.softmax(-distance.square(), -1) * values).sum(-1)

    for dtype, near in ((torch.float64, 1e-6), (torch.float32, 2e-5)):
        found, wanted = [], []
        for function, into, kind in (
            (lambda z, v: soft_spline(z, v, -3.0, 3.0), found, dtype),
            (reference, wanted, torch.float64),
        ):
            x, v = z.to(kind, copy=True), values.to(kind, copy=True)
            x.requires_grad_(), v.requires_grad_()
            out = function(x, v)
            (out * weight.to(kind)).sum().backward()
            into += [out.detach().double(), x.grad.double(), v.grad.double()]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=near * float(other.abs().max()), rtol=near)


def test_soft_interpolation_is_a_softmax_over_the_knots_and_not_the_identity() -> None:
    z, values, knots = normal(50, scale=3), normal(5, seed=1), knot_positions(5, -3.0, 3.0)
    weights = np.exp(-(((z[:, None] - knots) / 1.5) ** 2).double().numpy())
    want = weights @ values.double().numpy() / weights.sum(1)
    np.testing.assert_allclose(soft_spline(z, values, -3.0, 3.0).numpy(), want, atol=1e-5)
    assert (soft_spline(z, knots, -3.0, 3.0) - z).abs().max() > 0.3


def test_old_faults_can_be_made_again() -> None:
    z = normal(200, scale=2)
    bent = LoraSpline(config(spline_init="bent"))
    offsets = bent.values.detach() - knot_positions(5, -3.0, 3.0)
    assert offsets.tolist() == [1.5 * BEND * sign for sign in (1, -1, 1, -1, 1)]
    assert (bent(torch.zeros(1)) - 1.5 * BEND).abs() < 1e-6  # garbled while B is still 0
    small = LoraSpline(config(output_scale_init=0.1))
    torch.testing.assert_close(small(z), 0.1 * z)
    squashed = LoraSpline(config(normalize="tanh"))
    torch.testing.assert_close(squashed(z), torch.tanh(z))


def test_a_gated_spline_can_leave_its_start() -> None:
    """With the identity behind a gate of 0 every gradient of the spline would be 0 for ever."""
    model = adapted(gated=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(own.gate.grad.abs() > 1e-6 for own in splines(model).values())
    stuck = adapted(gated=True, spline_init="identity")
    stuck(input_ids=IDS, labels=IDS).loss.backward()
    for own in splines(stuck).values():
        assert all(p.grad.abs().max() < 1e-6 for p in own.parameters())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_knots": 1}, "num_knots is 1; expected 2 or more"),
        ({"k_min": 3.0}, "k_min is 3.0; expected less than k_max, 3.0"),
        ({"boundary": "wrap"}, "boundary is 'wrap'; expected one of"),
        ({"interpolation_method": "cubic"}, "interpolation_method is 'cubic'"),
        ({"spline_init": "random"}, "spline_init is 'random'"),
        ({"spline_reg_weight": -1.0}, "spline_reg_weight is -1.0"),
        ({"space": "both"}, "space is 'both'"),
    ],
)
def test_bad_options_are_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**option)


# The pull to the identity


def rows(count: int = 8) -> Dataset:
    ids = torch.randint(4, 67, (count, 6), generator=torch.Generator().manual_seed(3)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * 6] * count})


def trained_values(
    weight: float, tmp_path: Any, trainer: Any = Trainer, **arguments: Any
) -> dict[str, Tensor]:
    """The values after one SGD step of rate 0.1 over the same eight rows."""
    model = adapted(spline_reg_weight=weight, task_type="CAUSAL_LM").train()
    bend(model)
    kind = TrainingArguments if trainer is Trainer else arguments.pop("kind")
    extra = {} if trainer is Trainer else {"processing_class": tiny.tokenizer()}
    trainer(
        model=model,
        args=kind(
            output_dir=str(tmp_path),
            max_steps=1,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=1e9,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=rows(),
        **extra,
    ).train()
    return {name: own.values.detach().clone() for name, own in splines(model).items()}


def expected_pull(weight: float, rate: float = 0.1) -> dict[str, Tensor]:
    """What one step takes off the values: rate x the gradient of weight x mean (v - k)^2."""
    model = adapted()
    bend(model)
    return {
        name: rate * weight * 2 * (own.values - own.knots()).detach() / 5
        for name, own in splines(model).items()
    }


@pytest.mark.parametrize("accumulation", [1, 4])
def test_regulariser_counts_once_a_step_under_the_trainer(accumulation: int, tmp_path: Any) -> None:
    sizes = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    without, with_it = (trained_values(w, tmp_path, **sizes) for w in (0.0, 0.5))
    for name, pull in expected_pull(0.5).items():
        torch.testing.assert_close(without[name] - with_it[name], pull, atol=1e-6, rtol=1e-4)


def test_regulariser_counts_once_a_step_under_sft_trainer(tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")
    sizes = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "kind": trl.SFTConfig,
        "bf16": False,
        "gradient_checkpointing": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
    }
    found = [trained_values(w, tmp_path, trl.SFTTrainer, **dict(sizes)) for w in (0.0, 0.5)]
    for name, pull in expected_pull(0.5).items():
        torch.testing.assert_close(found[0][name] - found[1][name], pull, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("copied", "fused"), [(False, False), (True, False), (False, True)])
def test_regulariser_counts_once_with_a_scaler_and_on_a_copy(copied: bool, fused: bool) -> None:
    found = []
    for weight in (0.0, 0.5):
        model = adapted(spline_reg_weight=weight)
        bend(model)
        model = copy.deepcopy(model) if copied else model
        # A fused optimiser unscales by itself, within its step.
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()
        scaler.step(optimizer)
        found.append({name: own.values.detach() for name, own in splines(model).items()})
    for name, pull in expected_pull(0.5).items():
        torch.testing.assert_close(found[0][name] - found[1][name], pull, atol=1e-6, rtol=1e-4)


def test_regulariser_leaves_backward_and_idle_adapters_alone() -> None:
    model = adapted(spline_reg_weight=0.5)
    model.add_adapter("idle", config(spline_reg_weight=0.5))
    bend(model)
    idle = splines(model, "idle")
    for own in idle.values():
        own.values.data += 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()  # no gradient yet: nothing may move
    assert all(own.values.grad is None for own in splines(model).values())
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain = adapted(spline_reg_weight=0.0)
    bend(plain)
    plain(input_ids=IDS, labels=IDS).loss.backward()
    for name, own in splines(model).items():
        torch.testing.assert_close(own.values.grad, splines(plain)[name].values.grad)
    optimizer.step()
    assert all(torch.equal(own.values, own.knots() + 1.0) for own in idle.values())


def test_regularizer_is_the_function_whose_gradient_is_added() -> None:
    model = adapted(spline_reg_weight=0.5)
    assert spline_regularizer(model).item() == 0.0
    bend(model)
    total = spline_regularizer(model)
    want = sum(
        0.5 * float(((own.values - own.knots()) ** 2).detach().mean())
        for own in splines(model).values()
    )
    assert total.item() == pytest.approx(want, rel=1e-5)
    assert spline_regularizer(model, weight=1.0).item() == pytest.approx(2 * want, rel=1e-5)
    total.backward()
    for name, pull in expected_pull(0.5, rate=1.0).items():
        torch.testing.assert_close(splines(model)[name].values.grad, pull)


# Diagnostics


def test_diagnostics_are_the_numbers_they_say() -> None:
    model = adapted(gated=True, spline_init="identity")
    bend(model)
    for own in splines(model).values():
        own.gate.data.fill_(0.25)
    found = spline_diagnostics(model)
    assert len(found) == 4
    assert all(name.endswith(("q_proj", "down_proj")) for name in found)
    for name, own in splines(model).items():
        v, k = own.values.detach().double().numpy(), np.linspace(-3, 3, 5)
        assert found[name]["deviation"] == pytest.approx(np.abs(v - k).mean())
        assert found[name]["slope_variance"] == pytest.approx(np.var(np.diff(v) / 1.5), rel=1e-5)
        assert (found[name]["input_scale"], found[name]["gate"]) == (1.0, 0.25)
        assert "outside" not in found[name]
    with pytest.raises(UserError, match="adapter 'other': the model has no spline"):
        spline_diagnostics(model, "other")


def test_inputs_outside_the_grid_are_counted_only_when_asked() -> None:
    model = adapted()
    layer = next(m for n, m in model.named_modules() if n.endswith("0.self_attn.q_proj"))
    layer.lora_spline["default"].input_scale.data.fill_(8.0)
    seen = []
    handle = layer.lora_spline["default"].register_forward_pre_hook(lambda _, z: seen.append(z[0]))
    with torch.no_grad(), count_outside(model):
        for _ in range(2):
            model(input_ids=IDS)
        found = spline_diagnostics(model)
    handle.remove()
    z = 8.0 * torch.cat(seen)
    want = ((z < -3) | (z > 3)).double().mean().item()
    name = next(n for n in found if n.endswith("0.self_attn.q_proj"))
    assert 0.05 < want < 0.95
    assert found[name]["outside"] == pytest.approx(want)
    assert "outside" not in spline_diagnostics(model)[name]


def test_callback_logs_during_and_after_training(tmp_path: Any) -> None:
    model = adapted(task_type="CAUSAL_LM").train()
    callback = SplineDiagnosticsCallback(measure_outside=True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        logging_steps=2,
        learning_rate=0.05,
        weight_decay=0.1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[callback])
    with pytest.warns(UserWarning, match="pulls the values of splines towards 0"):
        trainer.train()
    logged = [line for line in trainer.state.log_history if "spline/deviation" in line]
    assert [line["step"] for line in logged[:2]] == [2, 4]
    assert 0 < logged[0]["spline/deviation"] < logged[1]["spline/deviation"]
    assert all(0 <= line["spline/outside"] <= 1 for line in logged)
    assert callback.final.keys() == splines(model).keys()
    deviations = [layer["deviation"] for layer in callback.final.values()]
    assert logged[-1]["spline/deviation"] == pytest.approx(np.mean(deviations))
    assert all(own.outside is None for own in splines(model).values())


def test_training_resumes_from_a_checkpoint_to_the_same_bits(tmp_path: Any) -> None:
    def run(steps: int, folder: str, resume: bool) -> Any:
        model = adapted(task_type="CAUSAL_LM", gated=True).train()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            save_steps=2,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    straight = run(4, "straight", False)
    run(2, "broken", False)
    resumed = run(4, "broken", True)
    assert any("gate" in name for name in resumed)
    assert all(torch.equal(resumed[name], parameter) for name, parameter in straight.items())


@pytest.mark.parametrize("knots", [5, 6, 8, 11])
def test_the_identity_is_exact_on_a_bf16_base_whatever_the_grid(knots: int) -> None:
    base = tiny.model("llama", torch.bfloat16)
    config = LSLoraConfig(r=4, target_modules=["q_proj"], num_knots=knots)
    model = get_peft_model(base, config)
    splines = [m for n, m in model.named_modules() if n.endswith("lora_spline.default")]
    assert splines
    for made in splines:
        assert made.values.dtype == torch.float32
        grid = torch.arange(knots, dtype=torch.float32) * (6 / (knots - 1)) - 3
        assert torch.equal(made.values.detach(), grid)
        z = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16() * 4
        assert torch.equal(made(z), z)
