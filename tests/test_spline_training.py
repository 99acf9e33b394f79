"""LS-LoRA in training: the pull to the identity, and a resume."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import tiny
from loralab.adapters.spline_diagnostics import (
    splines,
)
from loralab.adapters.spline_penalty import spline_regularizer
from spline_models import (
    IDS,
    adapted,
    bend,
    config,
    rows,
)


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
