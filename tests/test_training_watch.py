"""A training's own numbers: losses, gradients, updates, the setup, and the way back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loralab.health import GuardCallback, guard_view
from loralab.health.setup import setup_values
from loralab.health.snapshot import Snapshot, halve_learning_rate
from loralab.health.training_watch import TrainingWatch, planned_dose
from watched_training import PROMPTS, adapted, rows, same, trainer, weights


def model_and_batch() -> tuple[Any, dict[str, Tensor]]:
    model = adapted().train()
    return model, {
        key: torch.tensor([row[key] for row in rows(4)]) for key in ("input_ids", "labels")
    }


def test_the_watch_measures_gradients_and_updates() -> None:
    model, batch = model_and_batch()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    watch = TrainingWatch(model, steps=4)
    watch.begin()
    model(**batch)["loss"].backward()
    assert watch.gradients_ready(compare=True)
    before = weights(model)
    optimiser.step()
    watch.step_done(1, 0.5)
    after = weights(model)
    moved = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before))
    size = math.sqrt(sum(float(before[n].square().sum()) for n in before))
    values = watch.values(rows=4)
    assert values["update.ratio"] == pytest.approx(moved / size, rel=1e-4)
    # B is 0, so A has no gradient yet and half of the tensors stand still.
    assert values["update.none"] == 0.5
    assert values["train.progress"] == 0.25
    assert values["data.passes"] == 0.5
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    name = "base_model.model.model.layers.1.self_attn.v_proj"
    pair = [grads[f"{name}.lora_{part}.default.weight"] for part in "AB"]
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in pair if grad is not None))
    assert watch.by_module()[name] == pytest.approx(norm, rel=1e-5)
    assert len(watch.by_module()) == 4
    watch.end()
    assert not model._forward_hooks


@pytest.mark.parametrize(("fp16", "sound"), [(False, False), (True, True)])
def test_an_overflow_is_usual_under_loss_scaling_only(fp16: bool, sound: bool) -> None:
    model, batch = model_and_batch()
    watch = TrainingWatch(model, fp16=fp16)
    model(**batch)["loss"].backward()
    next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)  # type: ignore[union-attr]
    assert watch.gradients_ready() is sound
    assert watch.nonfinite == (0 if sound else 1)


def test_a_loss_is_read_in_training_only() -> None:
    model, batch = model_and_batch()
    watch = TrainingWatch(model)
    watch.begin()
    bad = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with torch.no_grad():
        model(**bad)
    model.eval()(**bad)
    assert watch.gradients_ready()
    model.train()(**bad)
    assert not watch.gradients_ready()
    assert watch.nonfinite == 1
    watch.end()


def test_raw_losses_tell_where_the_log_is_silent(tmp_path: Path) -> None:
    guard = GuardCallback(PROMPTS, texts=False)
    made = trainer(tmp_path, adapted(), guard, 10, learning_rate=0.1, logging_steps=500)
    made.train()
    values = guard.readings[-1].values
    assert values["train.loss_first"] != values["train.loss"]
    every = trainer(tmp_path, adapted(), None, 10, learning_rate=0.1)
    every.train()
    losses = [row["loss"] for row in every.state.log_history if "loss" in row]
    assert values["train.loss_first"] == pytest.approx(sum(losses[:5]) / 5, abs=1e-4)
    assert values["train.loss"] == pytest.approx(sum(losses[5:]) / 5, abs=1e-4)


def test_parts_of_an_accumulated_step_add_up() -> None:
    model, batch = model_and_batch()
    values = []
    for over in (None, 40):
        watch = TrainingWatch(model)
        watch.begin()
        losses = []
        for _ in range(2):
            loss = model(**batch, **({} if over is None else {"num_items_in_batch": over}))["loss"]
            loss.backward()
            losses.append(float(loss.detach()))
        watch.gradients_ready()
        watch.end()
        values.append(watch.values()["train.loss"] / sum(losses))
    assert values == [pytest.approx(0.5), pytest.approx(1)]


def test_a_loss_of_its_own_is_read_off_the_log(tmp_path: Path) -> None:
    """Where the model returns none, as under trainers that compute it from logits."""
    watch = TrainingWatch(adapted())
    watch.begin()
    watch.logged(3, {"loss": 2.0})
    assert watch.values()["train.loss"] == 2
    watch.end()


def test_losses_are_means_of_the_first_and_the_newest_steps() -> None:
    watch = TrainingWatch(adapted())
    for step in range(1, 21):
        watch.logged(step, {"loss": 4.0 if step <= 5 else 1.0 if step > 15 else 2.0})
    values = watch.values()
    assert values["train.loss_share"] == 0.25
    assert values["train.loss_rise"] == -0.75
    rare = TrainingWatch(adapted())
    for step in (10, 20, 30):
        rare.logged(step, {"loss": float(step), "grad_norm": 1.0 if step < 30 else 90.0})
    assert rare.values()["train.loss_first"] == 10
    assert rare.values()["train.loss"] == 30
    assert rare.values()["grad.spike"] == 90
    watch.forget(7)
    assert watch.values()["train.loss_share"] == 1, "of what is forgotten nothing is left"
    watch.logged(8, {"loss": 3.0})
    assert watch.values()["train.loss_share"] == 0.75


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_the_planned_dose_is_the_sum_of_the_rates(tmp_path: Path, schedule: str) -> None:
    guard = GuardCallback(PROMPTS, texts=False)
    made = trainer(tmp_path, adapted(), guard, steps=8, lr_scheduler_type=schedule, warmup_steps=3)
    made.train()
    rates = [row["learning_rate"] for row in made.state.log_history if "loss" in row]
    assert guard.readings[0].values["train.dose"] == pytest.approx(sum(rates), rel=1e-6)


def test_sgd_has_no_dose() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimiser = torch.optim.SGD([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0)
    assert math.isnan(planned_dose(optimiser, schedule, 5))
    adam = torch.optim.AdamW([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1.0)
    assert planned_dose(adam, schedule, 5) == pytest.approx(0.5)


def test_a_snapshot_restores_weights_and_moments_to_the_bit() -> None:
    model, batch = model_and_batch()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))

    def steps(count: int) -> None:
        for _ in range(count):
            optimiser.zero_grad()
            model(**batch)["loss"].backward()
            optimiser.step()

    steps(3)
    kept = Snapshot(model, optimiser, 3)
    before = weights(model)
    steps(2)
    after = weights(model)
    assert not same(before, after)
    kept.restore(model, optimiser)
    assert same(weights(model), before)
    steps(2)
    assert same(weights(model), after), "the moments came back too"
    kept.restore(model, optimiser)
    halve_learning_rate(optimiser, schedule)
    assert optimiser.param_groups[0]["lr"] == 5e-3
    optimiser.step()
    schedule.step()
    assert optimiser.param_groups[0]["lr"] == 2.5e-3


def test_setup_reads_scaling_off_its_config() -> None:
    model = adapted()
    assert setup_values(model)["setup.scaling"] == 0
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.scaling["default"] *= 2
    assert setup_values(model)["setup.scaling"] == pytest.approx(math.log(2))
    rooted = adapted(use_rslora=True)
    assert setup_values(rooted)["setup.scaling"] == pytest.approx(0)


def test_setup_knows_a_start_that_was_not_prepared() -> None:
    assert "setup.unprepared" not in setup_values(adapted())
    model = adapted(init_lora_weights="eva")
    assert setup_values(model)["setup.unprepared"] == 1
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = torch.linalg.qr(parameter.data.T).Q.T.contiguous()
    assert setup_values(model)["setup.unprepared"] == 0


def test_sharded_optimisers_are_not_judged() -> None:
    flat = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    assert "setup.left_out" not in setup_values(adapted(), flat)


def test_a_model_is_asked_of_its_rows_once_it_may_have_learned_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_view, "TOKENS", 5)
    data = [{**row, "labels": [-100] * 4 + row["labels"][4:]} for row in rows()]
    guard = GuardCallback(PROMPTS)
    trainer(tmp_path, adapted(), guard, steps=6, data=data).train()
    asked = ["data.learned_gain" in one.values for one in guard.readings]
    assert [one.step for one in guard.readings] == [0, 1, 5, 6]
    assert asked == [False, False, True, True]
    assert all("data.pair_gain" in one.values for one in guard.readings), "the base's are told"
