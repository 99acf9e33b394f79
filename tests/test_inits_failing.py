"""A start that fails leaves the model as it was."""

from __future__ import annotations

import copy
import sys
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tiny
from loralab.adapters.extract import state_of
from loralab.adapters.inits import initialize, progressive
from loralab.adapters.inits.progressive import callback_for
from loralab.adapters.true_base import memory_of, true_base
from loralab.errors import UserError
from starts import (
    RANK,
    layers,
    logits,
    peft_model,
    shake,
    start,
)

# By this name: the package has a function of the module's.
initialize_module = sys.modules["loralab.adapters.inits.initialize"]


def test_a_start_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model()
    shake(model)
    before = logits(model)
    with pytest.raises(UserError, match="texts"):
        initialize(model, "corda")
    with pytest.raises(UserError, match="no option"):
        start(model, "tiny", size=3)
    with pytest.raises(UserError, match="did you mean 'zero_b'"):
        start(model, "zero-b")
    with pytest.raises(UserError, match="no LoRA adapter"):
        start(model, "zero_b", adapter="other")
    assert torch.equal(logits(model), before)


def test_embeddings_are_refused_by_name() -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    model = get_peft_model(tiny.model("llama"), config)
    with pytest.raises(UserError, match=r"embed_tokens is Embedding"):
        start(model, "zero_b")


def everything(model: Any) -> dict[str, Any]:
    """All of a model that a start may change, as values."""
    config = vars(model.peft_config["default"])
    found: dict[str, Any] = {"config": copy.deepcopy(config), "training": model.training}
    found["learned"] = {n: p.requires_grad for n, p in model.named_parameters()}
    found["logits"] = logits(model)
    found["weights"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, layer in layers(model).items():
        memory = memory_of(layer)
        if memory is not None:
            found[f"{name}.memory"] = memory.weight.clone(), memory.A0, memory.B0
        found[f"{name}.scaling"] = layer.scaling["default"], layer.lora_alpha["default"]
    callback = callback_for(model)
    if callback is not None:
        found["share"] = callback.schedule.share, list(callback.schedule.history)
    with true_base(model):
        found["true base"] = logits(model)
    # PEFT lets both factors learn when it switches an adapter on again.
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(found["learned"][parameter_name])
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, tuple):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@pytest.mark.parametrize("earlier", ["zero_b", "pissa", "loftq", "mica", "progressive"])
@pytest.mark.parametrize("name", ["eva", "pissa", "loftq", "progressive", "lora_ga"])
@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_whatever_a_start_had_done_when_it_failed_is_undone(
    name: str, earlier: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = peft_model()
    start(model, earlier)
    shake(model)
    callback = callback_for(model)
    if callback is not None:
        callback.schedule.step(model, 30)
        callback.schedule.finish(model)
    before = everything(model)

    def fail(*_: Any, **__: Any) -> None:
        raise error("half-way")

    # The last thing each of them does, in the last module where it goes by module.
    *_, last = layers(model).values()
    owners = {
        "eva": (peft, "initialize_lora_eva_weights"),
        "pissa": (last, "pissa_init"),
        "lora_ga": (last, "lora_ga_init"),
        "loftq": (initialize_module, "_means"),
        "progressive": (progressive.ProgressiveScaling, "step"),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*owners[name], fail)
        with pytest.raises(error, match="half-way"):
            start(model, name)
    after = everything(model)
    assert not [key for key in before if not same(before[key], after.get(key))]
    # And it is not only looks: the next start finds what it needs.
    start(model, "zero_b")
    assert torch.equal(logits(model), logits(tiny.model("llama")))


def test_a_start_without_its_texts_leaves_the_earlier_one_whole() -> None:
    model = peft_model()
    initialize(model, "pissa")
    before = logits(model)
    with pytest.raises(UserError, match="texts"):
        initialize(model, "eva")
    assert torch.equal(logits(model), before)
    assert state_of(model).rank == 2 * RANK
