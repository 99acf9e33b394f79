"""PEFT's own starts are PEFT's own, and the true base comes back from those that change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor

import tiny
from loralab.adapters.extract import state_of
from loralab.adapters.inits.calibration import measure
from loralab.adapters.true_base import base_changed, true_base
from starts import (
    ALPHA,
    RANK,
    SPLITTING,
    factors,
    layers,
    logits,
    peft_model,
    shake,
    start,
    texts,
)


def _native(name: str) -> Any:
    """The same start through PEFT's own door."""
    model, config = tiny.model("llama"), LoraConfig(r=RANK, lora_alpha=ALPHA)
    config.target_modules = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    config.init_lora_weights = name
    tokenizer = tiny.tokenizer()
    rows = [
        torch.tensor([tokenizer(t, add_special_tokens=False)["input_ids"]]) for t in texts()[:-2]
    ]
    if name == "corda":
        config.corda_config = CordaConfig(corda_method="ipm")
        preprocess_corda(model, config, lambda: [model(input_ids=row) for row in rows])
    if name == "lora_ga":
        config.lora_ga_config = LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16)
        preprocess_loraga(
            model, config, lambda: [model(input_ids=r, labels=r).loss.backward() for r in rows]
        )
    return get_peft_model(model, config)


@pytest.mark.parametrize("name", ["mica", *SPLITTING])
def test_peft_s_own_equal_peft_s_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # lora_ga's randomised SVD turns triples of near values as its random numbers fall.
    def exact(matrix: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :q], s[:q], vt[:q].T

    monkeypatch.setattr(torch, "svd_lowrank", exact)
    theirs, ours = _native(name), peft_model()
    start(ours, name)
    for path, layer in layers(theirs).items():
        mine = layers(ours)[path]
        product = mine.lora_B["default"].weight @ mine.lora_A["default"].weight
        expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(product, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            mine.get_base_layer().weight, layer.get_base_layer().weight, atol=1e-4, rtol=1e-4
        )


def test_eva_s_rows_are_the_main_directions_of_the_inputs() -> None:
    model = peft_model()
    start(model, "eva")
    tokenizer = tiny.tokenizer()
    rows = [
        torch.tensor([tokenizer(t, add_special_tokens=False)["input_ids"]]) for t in texts()[:-2]
    ]
    modules = layers(model)
    with model.disable_adapter():
        moments = measure(model, modules, rows)
    shares = []
    for name, pair in factors(model).items():
        c = moments.of(name)
        total = float(c.trace())
        q = torch.linalg.qr(pair.A.T).Q
        best = float(moments.eigen(name)[0][-RANK:].sum())
        shares.append(float((q.T @ c @ q).trace()) / best)
        assert total > 0
        assert not pair.B.any()
    # Incremental PCA takes the mean out and stops early, so not all of it.
    assert sum(shares) / len(shares) > 0.7


def test_eva_moves_ranks_to_where_inputs_need_them_and_keeps_their_sum() -> None:
    model = peft_model()
    before = logits(model)
    start(model, "eva", rho=2.0)
    ranks = [pair.A.shape[0] for pair in factors(model).values()]
    assert len(set(ranks)) > 1
    assert max(ranks) <= 2 * RANK
    assert sum(ranks) == RANK * len(ranks)
    torch.testing.assert_close(logits(model), before)
    shake(model)
    state = state_of(model)
    plain = tiny.model("llama")
    for name, (a, b) in state.factors.items():
        plain.get_submodule(name).weight.data += state.scaling * b @ a
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-3, rtol=1e-3)


def test_mica_freezes_b_and_learns_a() -> None:
    model = peft_model()
    start(model, "mica")
    with true_base(model):
        pass  # PEFT switches the adapters on again behind it
    for layer in layers(model).values():
        assert not layer.lora_B["default"].weight.requires_grad
        assert layer.lora_A["default"].weight.requires_grad


def test_after_mica_another_start_learns_with_both_factors() -> None:
    model = peft_model()
    start(model, "mica")
    layer = next(iter(layers(model).values()))
    layer.frozen_peft_weight_names = {"default": ("lora_B",), "other": ("lora_B",)}
    start(model, "zero_b")
    assert model.peft_config["default"].init_lora_weights is True
    assert layer.frozen_peft_weight_names == {"other": ("lora_B",)}
    assert all(x.lora_B["default"].weight.requires_grad for x in layers(model).values())
    start(model, "gaussian")
    start(model, "zero_b")
    assert model.peft_config["default"].init_lora_weights is True


@pytest.mark.parametrize("name", [*SPLITTING, "loftq"])
def test_the_true_base_comes_back_to_the_bit(name: str) -> None:
    reference = logits(tiny.model("llama"))
    model = peft_model()
    assert not base_changed(model)
    start(model, name)
    shake(model)
    after = logits(model)
    with true_base(model):
        assert torch.equal(logits(model), reference)
    assert torch.equal(logits(model), after)
    with model.disable_adapter():
        assert (logits(model) - reference).abs().max() > 1e-3, "PEFT's own reference is not it"
    with pytest.raises(ZeroDivisionError), true_base(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), after)


@pytest.mark.parametrize("name", SPLITTING)
def test_the_adapter_saved_is_relative_to_the_true_base(name: str, tmp_path: Any) -> None:
    model = peft_model()
    start(model, name)
    shake(model)
    state = state_of(model)
    assert state.rank == 2 * RANK
    state.save(tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=2e-4, rtol=1e-3)


def test_starting_again_undoes_what_was_done_to_the_base() -> None:
    model = peft_model()
    start(model, "pissa")
    start(model, "zero_b")
    assert not base_changed(model)
    assert torch.equal(logits(model), logits(tiny.model("llama")))
    start(model, "pissa")
    once = factors(model)
    start(model, "pissa")
    assert all(torch.equal(once[n].A, pair.A) for n, pair in factors(model).items())


def test_a_base_that_peft_changed_goes_on_being_marked() -> None:
    model = peft_model(init_lora_weights="pissa")
    start(model, "zero_b")
    assert model.peft_config["default"].init_lora_weights == "pissa"
