"""The fast LoRA step against PEFT's own forward and autograd."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tiny
from fast_models import (
    TOLERANCE,
    Net,
    adapted,
    assert_close,
    randomize,
    results,
    sample,
    with_small_update,
)
from loralab.gradient import fast


def assert_same_as_peft(model: Any, taken: int | None = None, **sampled: Any) -> None:
    x, weights = sample(**sampled)
    expected = results(model, x, weights)
    fast.patch(model)
    if taken is not None:
        assert len(fast.report(model).taken) == taken
    assert_close(results(model, x, weights), expected)


@pytest.mark.parametrize("rows", [(7,), (3, 5), (2, 3, 4), (0,), (1,)])
def test_equal_to_peft_in_fp32(rows: tuple[int, ...]) -> None:
    assert_same_as_peft(adapted(), taken=2, rows=rows)


def test_gradients_reach_x_a_and_b_of_both_layers_and_not_the_base() -> None:
    model = fast.patch(adapted())
    found = results(model, *sample())
    assert len(found) == 6
    assert all(g.abs().max() > 1e-3 for g in found.values())
    assert not any(n.endswith(("base_layer.weight", "base_layer.bias")) for n in found)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"second": 2}, "alpha_pattern": {"second": 5}},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_scalings_of_peft(options: dict[str, Any]) -> None:
    assert_same_as_peft(adapted(**options), taken=2)


def test_dropout_draws_what_peft_draws() -> None:
    model = adapted(lora_dropout=0.4).train()
    x, weights = sample()
    expected = results(model, x, weights)
    assert (expected["y"] - results(model.eval(), x, weights)["y"]).abs().max() > 0.1
    fast.patch(model.train())
    assert_close(results(model, x, weights), expected)
    assert_close(results(model.eval(), x, weights), results(fast.unpatch(model), x, weights))


def test_gpt2_conv1d() -> None:
    base = tiny.model("gpt2").requires_grad_(False)
    config = LoraConfig(r=4, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    model = get_peft_model(base, config)
    randomize(model)
    tokens = torch.arange(12).view(2, 6)
    expected = model(tokens, labels=tokens)
    expected.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fast.patch(model)
    assert len(fast.report(model).taken) == 8
    found = model(tokens, labels=tokens)
    found.loss.backward()
    assert (found.logits - expected.logits).abs().max() < 1e-4
    scale = max(float(g.abs().max()) for g in gradients.values())
    for name, wanted in gradients.items():
        assert (model.get_parameter(name).grad - wanted).abs().max() < TOLERANCE * scale, name


def test_gradcheck_in_fp64() -> None:
    from loralab.gradient.lora_function import lora_linear

    torch.manual_seed(0)
    made = [torch.randn(s, dtype=torch.float64) for s in ((5, 6), (7, 6), (7,), (3, 6), (7, 3))]
    x, weight, bias, a, b = made
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, weight, bias, a, b, 1.7), (x, a, b)
    )


@pytest.mark.parametrize("adapter_fp32", [True, False])
def test_bf16_is_nearer_to_fp32_than_peft(adapter_fp32: bool) -> None:
    exact = with_small_update(adapted())
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()  # the same numbers in both types
    rough = copy.deepcopy(exact).bfloat16()
    if adapter_fp32:
        for name, parameter in rough.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    x, weights = sample(torch.bfloat16, rows=(400,))
    reference = results(exact, x.float(), weights)
    peft = results(rough, x, weights)
    ours = results(fast.patch(rough), x, weights)
    assert len(fast.report(rough).taken) == 2
    assert ours.keys() == reference.keys()

    def error(found: Tensor, name: str) -> float:
        return float((found.float() - reference[name]).norm() / reference[name].norm())

    assert error(ours["y"], "y") < 0.9 * error(peft["y"], "y")
    for name in reference:
        assert ours[name].dtype == peft[name].dtype
        assert error(ours[name], name) < 0.02, name


def test_update_under_half_an_ulp_of_the_base_is_not_lost_where_it_can_count() -> None:
    layer = nn.Linear(32, 8, bias=False).bfloat16()
    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape).bfloat16().to(parameter.dtype)
        if "lora_B" in name:
            parameter.data *= 2**-7
    x = torch.randn(4000, 32).bfloat16()
    exact = copy.deepcopy(model).float()(x.float())
    with torch.no_grad():
        peft = (model(x).float() - exact).norm()
        ours = (fast.patch(model)(x).float() - exact).norm()
        nearest = (exact.bfloat16().float() - exact).norm()
    assert ours < 1.02 * nearest
    assert ours < 0.8 * peft


def test_backward_keeps_the_input_once_and_nothing_else_of_its_size() -> None:
    model = adapted(torch.bfloat16)  # PEFT keeps its adapter in fp32
    x = sample(torch.bfloat16, rows=(300,))[0].requires_grad_()

    def kept() -> list[tuple[int, torch.dtype]]:
        tensors: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.dim() == 2 and tensor.shape[0] == 300 and tensor.shape[1] > 4:
                tensors[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model.model.first(x)
        return [(t.shape[1], t.dtype) for t in tensors.values()]

    assert (24, torch.float32) in kept()
    fast.patch(model)
    assert kept() == [(24, torch.bfloat16)]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(reentrant: bool, dropout: float) -> None:
    model = adapted(lora_dropout=dropout).train()
    x, weights = sample()
    expected = results(model, x, weights)
    fast.patch(model)

    def call(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    assert_close(results(model, x, weights, call), expected)


@pytest.mark.parametrize("adapter_fp32", [True, False])
def test_autocast(adapter_fp32: bool) -> None:
    model = with_small_update(adapted(torch.float32 if adapter_fp32 else torch.bfloat16))
    if not adapter_fp32:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()
    x, weights = sample(torch.float32 if adapter_fp32 else torch.bfloat16)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = model(x)
            return result

    exact = results(copy.deepcopy(model).float(), x.float(), weights)
    peft = results(model, x, weights, call)
    ours = results(fast.patch(model), x, weights, call)
    assert ours.keys() == peft.keys()
    assert len(fast.report(model).taken) == 2
    for name, wanted in peft.items():
        assert ours[name].dtype == wanted.dtype, name
        assert (ours[name] - exact[name]).norm() < 0.02 * exact[name].norm(), name
    assert (ours["y"] - exact["y"]).norm() < (peft["y"] - exact["y"]).norm()


@pytest.mark.filterwarnings("ignore:Already found")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("disabled", "adapters disabled"),
        ("merged", "merged"),
        ("two adapters", "2 active adapters"),
        ("hook on lora_B", "lora_A or lora_B has hooks"),
        ("hook on base", "base layer is a Linear with hooks"),
        ("base trained", "base layer is trained"),
    ],
)
def test_what_only_peft_can_run_falls_back(change: str, reason: str) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    randomize(model)
    layer = model.base_model.model.first
    if change == "disabled":
        model.base_model.disable_adapter_layers()
    elif change == "merged":
        model.merge_adapter()
    elif change == "two adapters":
        model.base_model.set_adapter(["default", "other"])
    elif change == "hook on lora_B":
        layer.lora_B["default"].register_forward_hook(lambda m, i, o: o * 3)
    elif change == "hook on base":
        layer.base_layer.register_forward_hook(lambda m, i, o: o * 3)
    elif change == "base trained":
        layer.base_layer.weight.requires_grad_()
    assert_same_as_peft(model)
    assert reason in fast.report(model).left["base_model.model.first"]


def test_active_adapter_may_change_after_the_patch() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    randomize(model)
    x, weights = sample()
    fast.patch(model)
    for name, taken in (("other", 1), ("default", 2)):
        model.set_adapter(name)
        assert len(fast.report(model).taken) == taken
        ours = results(model, x, weights)
        fast.unpatch(model)
        assert_close(ours, results(model, x, weights))
        fast.patch(model)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_variants_fall_back(options: dict[str, Any]) -> None:
    assert_same_as_peft(adapted(**options), taken=0)


def test_adapters_by_row_fall_back() -> None:
    model = adapted().eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    randomize(model)
    x, _ = sample(rows=(3,))
    names = ["other", "__base__", "default"]
    expected = model(x, adapter_names=names)
    torch.testing.assert_close(fast.patch(model)(x, adapter_names=names), expected)


def test_other_layers_are_reported_and_left() -> None:
    base = nn.Sequential(nn.Embedding(9, 24), Net())
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "first"]))
    fast.patch(model)
    found = fast.report(model)
    assert found.taken == ("base_model.model.1.first",)
    assert list(found.left) == ["base_model.model.0"]
    assert "Embedding" in str(found)
    assert "1 of 2" in str(found)


def test_patch_twice_and_unpatch_restore() -> None:
    model = adapted()
    fast.patch(fast.patch(model))
    copied = copy.deepcopy(model)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert all("forward" in vars(layer) for layer in layers)
    assert copied.base_model.model.first.forward.__self__ is copied.base_model.model.first
    before = set(model.state_dict())
    fast.unpatch(model)
    assert not any("forward" in vars(layer) for layer in layers)
    assert set(model.state_dict()) == before
    assert fast.report(model).left["base_model.model.first"] == "not patched"


def test_unpatch_refuses_when_the_forward_was_wrapped_since() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = fast.patch(adapted())
    add_hook_to_module(model.base_model.model.first, ModelHook())
    with pytest.raises(RuntimeError, match="first"):
        fast.unpatch(model)


def test_frozen_factor_gets_no_gradient_and_input_is_not_kept() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    x, weights = sample()
    expected = results(model, x, weights)
    fast.patch(model)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.base_model.model.first(x.clone().requires_grad_())
    assert not any(t.shape[-1] == 24 and t.shape[0] == 15 for t in kept)
    assert_close(results(model, x, weights), expected)


def test_language_model_end_to_end() -> None:
    base = tiny.model("llama")
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    randomize(model)
    tokens = torch.arange(24).view(2, 12)
    model(tokens, labels=tokens).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fast.patch(model)
    assert not fast.report(model).left
    model(tokens, labels=tokens).loss.backward()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, wanted in expected.items():
        assert (model.get_parameter(name).grad - wanted).abs().max() <= TOLERANCE * scale, name


def test_distributed_data_parallel() -> None:
    import torch.distributed as dist

    model = adapted()
    x, weights = sample()
    expected = results(model, x, weights)
    fast.patch(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        assert_close(results(model, x, weights, parallel), expected)
        del parallel
        gc.collect()  # before its group goes, or gloo's threads hang at exit
    finally:
        dist.destroy_process_group()
