"""What nonlinear adapters cannot do is refused before anything is touched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import tiny
from loralab.errors import UserError
from nonlinear_models import (
    adapted,
    config,
    every,
    logits,
)

MERGEABLE = ("weight", "sine")


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
