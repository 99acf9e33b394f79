"""What is said of splines: how far they moved, and whether the grid fits their inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import tiny
from loralab.adapters import spline_watch
from loralab.adapters.spline_diagnostics import count_outside, spline_diagnostics, splines
from loralab.adapters.spline_penalty import spline_regularizer
from loralab.adapters.spline_watch import (
    TOKENS,
    OutsideSample,
    SplineDiagnosticsCallback,
    SplineWatch,
)
from loralab.errors import UserError
from loralab.gradient import fast
from spline_models import (
    IDS,
    adapted,
    bend,
    config,
    rows,
)


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


def outside_of(z: Tensor) -> float:
    return ((z < -3) | (z > 3)).double().mean().item()


def scaled_up(**options: Any) -> Any:
    """Inputs spread over the ends of the grid, differently by layer."""
    model = adapted(**options)
    for index, own in enumerate(splines(model).values()):
        own.input_scale.data.fill_(2.0 + 3 * index)
    return model


@pytest.mark.parametrize("patched", [False, True])
def test_a_sample_sees_what_the_splines_see_and_leaves_the_forward_alone(
    patched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spline_watch, "TOKENS", IDS.numel())
    model = scaled_up()
    with torch.no_grad(), count_outside(model):
        model(input_ids=IDS)
        want = {name: row["outside"] for name, row in spline_diagnostics(model).items()}
    assert len(set(want.values())) == 4
    if patched:
        fast.patch(model)
    sample = OutsideSample(model)
    before = model(input_ids=IDS).logits
    sample.begin()
    if patched:
        assert not fast.report(model).left, "a fused forward goes on"
    assert torch.equal(model(input_ids=IDS).logits, before)
    with model.disable_adapter():
        model(input_ids=IDS[:, :3])  # not an input of any spline
    sample.end()
    assert sample.shares() == pytest.approx(want)
    model(input_ids=IDS[:1])
    assert sample.shares() == pytest.approx(want), "no more is counted"
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_sample_of_a_long_batch_is_spread_over_it() -> None:
    model = scaled_up()
    ids = torch.randint(4, 67, (8, 90), generator=torch.Generator().manual_seed(2))
    seen = {}
    for name, own in splines(model).items():
        own.register_forward_pre_hook(lambda _, z, name=name: seen.update({name: z[0]}))
    sample = OutsideSample(model)
    sample.begin()
    with torch.no_grad():
        model(input_ids=ids)
    for name, own in splines(model).items():
        z = own.input_scale.detach() * seen[name].flatten(0, 1)[:: 720 // TOKENS]
        assert sample.shares()[name] == pytest.approx(outside_of(z), abs=1e-6)
        assert sample.shares()[name] == pytest.approx(
            outside_of(own.input_scale.detach() * seen[name]), abs=0.1
        )


def test_the_inputs_of_a_spline_on_weights_are_its_update() -> None:
    model = scaled_up(space="weight", k_min=-0.3, k_max=0.3)
    sample = OutsideSample(model)
    sample.begin()
    for name, share in sample.shares().items():
        layer = model.get_submodule(name)
        ba = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        z = 1.5 * ba * layer.lora_spline["default"].input_scale
        assert share == pytest.approx(((z < -0.3) | (z > 0.3)).double().mean().item())
        assert 0.01 < share < 0.99


def test_numbers_of_splines_with_other_grids_stay_their_own() -> None:
    model = adapted(num_knots=4)
    model.add_adapter("other", config(num_knots=7, k_max=5.0, gated=True))
    bend(model)
    for own in splines(model, "other").values():
        own.reg_weight = 0.3
        own.values.data += 0.2
    for adapter, count, top in (("default", 4, 3.0), ("other", 7, 5.0)):
        for name, row in spline_diagnostics(model, adapter).items():
            own = splines(model, adapter)[name]
            v, k = own.values.detach().double().numpy(), np.linspace(-3, top, count)
            assert row["deviation"] == pytest.approx(np.abs(v - k).mean(), rel=1e-5)
            assert ("gate" in row) == (adapter == "other")
        wanted = float(spline_regularizer(model, adapter))
        assert SplineWatch(model, adapter).summary()["regularizer"] == pytest.approx(wanted)
        assert wanted > 1e-4


def test_callback_logs_during_and_after_training(tmp_path: Any) -> None:
    model = scaled_up(task_type="CAUSAL_LM").train()
    callback = SplineDiagnosticsCallback()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=13,
        logging_steps=1,
        learning_rate=0.02,
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
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in logged if "spline/outside" in line] == [1, 10, 13]
    assert all(0 < line["spline/outside"] < 1 for line in logged if "spline/outside" in line)
    assert 0 < logged[0]["spline/deviation"] < logged[-1]["spline/deviation"]
    assert callback.final.keys() == splines(model).keys()
    for key in ("deviation", "outside", "slope_variance", "input_scale", "output_scale"):
        values = [layer[key] for layer in callback.final.values()]
        assert logged[-1][f"spline/{key}"] == pytest.approx(np.mean(values))
        assert logged[-1][f"spline/{key}_max"] == max(values)
    assert [line["step"] for line in callback.history] == [1, 10, 13]
    assert callback.history[-1]["outside"] == logged[-1]["spline/outside"]
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("log_every", "sampled"), [(1, [1, 10, 20, 23]), (4, [1, 12, 23])])
def test_sampled_steps_are_among_the_logged(log_every: int, sampled: list[int]) -> None:
    model = adapted()
    watch = SplineWatch(model, log_every=log_every)
    for step in range(1, 24):
        watch.before_step(step, 23)
        with torch.no_grad():
            model(input_ids=IDS)
        watch.after_step(step)
        assert ("outside" in watch.summary()) == (step in sampled)
    assert [line["step"] for line in watch.history] == sampled
    assert SplineWatch.of(tiny.model("llama")) is None
