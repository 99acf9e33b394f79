"""Gradient checkpointing runs parts of a model twice and changes no number, of any kind."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import modeling_utils

import tiny
from loralab.config import TrainingConfig
from loralab.config.dpo import PreferenceConfig
from loralab.config.grpo import PolicyConfig
from loralab.config.verifier import HeadConfig
from loralab.gradient.dpo import reference_of, train_pairs
from loralab.gradient.grpo import train_policy
from loralab.gradient.loop import History
from loralab.gradient.verifier import train_verifier
from test_dpo import model_with, some_pairs
from test_grpo import peft_model, some_groups
from test_verifier import some_solutions, verifier_of


def dpo(settings: TrainingConfig) -> History:
    model = model_with(moved=True)
    return train_pairs(
        model, tiny.tokenizer(), some_pairs(), settings, PreferenceConfig(), 0,
        reference=reference_of(model, "base"),
    )  # fmt: skip


def grpo(settings: TrainingConfig) -> History:
    return train_policy(
        peft_model(moved=0.05), tiny.tokenizer(), lambda model, number: some_groups(number),
        settings, PolicyConfig(beta=0.1, updates=2), 0,
    )  # fmt: skip


def verifier(settings: TrainingConfig) -> History:
    judge, layout = verifier_of(settings, random=True)
    return train_verifier(judge, some_solutions(), settings, HeadConfig(), 0, layout=layout)


@pytest.mark.parametrize("train", [dpo, grpo, verifier])
@pytest.mark.parametrize("fast", [True, False])
def test_it_changes_no_number(train: Any, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = modeling_utils.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    settings = TrainingConfig(steps=2, batch_size=3, lr=1e-2, fast=fast)
    plain = train(settings)
    assert not calls
    again = train(settings.model_copy(update={"gradient_checkpointing": True}))
    assert calls
    assert again.losses == pytest.approx(plain.losses, abs=1e-6)
    assert again.grad_norms == pytest.approx(plain.grad_norms, rel=1e-4)
