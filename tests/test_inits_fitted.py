"""Starts fitted to something, against what they should be the best of."""

from __future__ import annotations

import copy
from math import sqrt

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tiny
from loralab.adapters.dense import dense_weight
from loralab.adapters.extract import state_of
from loralab.adapters.inits.calibration import measure
from loralab.adapters.inits.quantize import fake_quantize
from loralab.adapters.inits.warm import resized
from loralab.adapters.state import AdapterState, Factors
from loralab.adapters.targets import linear_weights
from loralab.errors import UserError
from starts import (
    ALPHA,
    EVERY_TYPE,
    RANK,
    factors,
    ids,
    layers,
    logits,
    peft_model,
    shake,
    start,
    texts,
)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_svd_delta_gives_back_a_low_rank_change(kind: str) -> None:
    base, tuned = tiny.model(kind), tiny.model(kind)
    generator = torch.Generator().manual_seed(3)
    for weight in linear_weights(tuned).values():
        out, width = weight.shape
        change = torch.randn(out, 3, generator=generator) @ torch.randn(
            3, width, generator=generator
        )
        weight += 0.01 * change
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=EVERY_TYPE)
    model = get_peft_model(base, config).eval()
    report = start(model, "svd_delta", reference=tuned)
    torch.testing.assert_close(logits(model), logits(tuned), atol=1e-3, rtol=1e-3)
    assert report.figures["energy"] == pytest.approx(1, abs=1e-4)


def test_svd_delta_says_of_each_module_what_its_rank_keeps() -> None:
    base, tuned = tiny.model("llama"), tiny.model("llama", seed=1)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=EVERY_TYPE)
    report = start(get_peft_model(copy.deepcopy(base), config), "svd_delta", reference=tuned)
    old, new = linear_weights(base), linear_weights(tuned)
    assert report.by_module.keys() == old.keys()
    for name, figures in report.by_module.items():
        s = torch.linalg.svdvals(new[name] - old[name])
        kept = float(s[:RANK].square().sum() / s.square().sum())
        assert figures["energy"] == pytest.approx(kept, rel=1e-3)
        assert 0.1 < kept < 0.9


def test_moments_are_those_of_the_inputs() -> None:
    model = tiny.model("llama")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    rows = [ids()[:1], ids(2)[:1, :9]]
    seen: dict[str, list[Tensor]] = {n: [] for n in modules}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().flatten(0, 1))
        )
    moments = measure(model, modules, rows)
    for name, inputs in seen.items():
        x = torch.cat(inputs)
        torch.testing.assert_close(moments.of(name), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        m = torch.randn(7, x.shape[1])
        assert moments.size(name, m) == pytest.approx(float((x @ m.T).pow(2).sum(1).mean().sqrt()))
    q, k = (f"model.layers.0.self_attn.{x}_proj" for x in "qk")
    assert moments.leader[k] == q, "q and k read one tensor"
    assert moments.leader["model.layers.0.mlp.down_proj"] != q


@pytest.mark.parametrize("method", ["null_space", "gradient"])
def test_output_match_is_quiet_on_typical_inputs_with_both_factors_there(method: str) -> None:
    model, plain = peft_model(), peft_model()
    report = start(model, "output_match", method=method)
    start(plain, "random")
    before, after = factors(plain), factors(model)
    for name in after:
        assert after[name].B.norm() == pytest.approx(float(before[name].B.norm()), rel=0.2)
        assert after[name].A.norm() == pytest.approx(float(before[name].A.norm()), rel=0.2)
    # What the random start would have had, by the same measure.
    model.eval()
    modules = {n.removeprefix("base_model.model."): m for n, m in layers(plain).items()}
    tokenizer = tiny.tokenizer()
    rows = [torch.tensor([tokenizer(t, add_special_tokens=False)["input_ids"]]) for t in texts()]
    with plain.disable_adapter():
        moments = measure(plain, modules, rows[-2:])
    shares = []
    for name, figures in report.by_module.items():
        pair = before[f"base_model.model.{name}"]
        weight = modules[name].get_base_layer().weight
        random_size = moments.size(name, 2 * pair.B @ pair.A) / moments.size(name, weight)
        shares.append(figures["residual_held_out"] / random_size)
    assert sum(shares) / len(shares) < 0.75


def test_quantization_match_is_the_least_error_on_the_inputs() -> None:
    full = tiny.model("llama")
    rough = copy.deepcopy(full)
    for name, module in rough.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = fake_quantize(module.weight.data, 4)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=EVERY_TYPE)
    model = get_peft_model(rough, config).eval()
    report = start(model, "quantization_match", reference=full)
    assert report.figures["left_fit"] < 0.9

    matched = factors(model)
    full_weights = dict(full.named_modules())
    tokenizer = tiny.tokenizer()
    rows = [torch.tensor([tokenizer(t, add_special_tokens=False)["input_ids"]]) for t in texts()]
    modules = {n.removeprefix("base_model.model."): m for n, m in layers(model).items()}
    with model.disable_adapter():
        moments = measure(model, modules, rows[:-2])
    for name, layer in modules.items():
        error = full_weights[name].weight.data - layer.get_base_layer().weight.data
        a, b = matched[f"base_model.model.{name}"]
        u, s, vt = torch.linalg.svd(error)
        of_weights = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        best = moments.size(name, error - 2 * b @ a)
        assert best <= moments.size(name, error - of_weights) * 1.001
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):  # no small move is better
            da = 1e-2 * a.norm() / sqrt(a.numel()) * torch.randn(a.shape, generator=generator)
            db = 1e-2 * b.norm() / sqrt(b.numel()) * torch.randn(b.shape, generator=generator)
            assert best <= moments.size(name, error - 2 * (b + db) @ (a + da)) * 1.001


@pytest.mark.parametrize(("bits", "kind"), [(4, "llama"), (8, "llama"), (4, "gpt2")])
def test_loftq_is_nearer_to_the_weight_the_more_turns_it_takes(bits: int, kind: str) -> None:
    base = linear_weights(tiny.model(kind))
    left = {}
    for iterations in (1, 5):
        model = peft_model(kind)
        report = start(model, "loftq", bits=bits, iterations=iterations)
        distance = 0.0
        for name, layer in layers(model).items():
            w = base[name.removeprefix("base_model.model.")]
            q = dense_weight(layer.get_base_layer())
            # The base holds values that quantise to themselves.
            torch.testing.assert_close(fake_quantize(q, bits), q, atol=1e-6, rtol=1e-4)
            pair = factors(model)[name]
            distance += float((w - q - 2 * pair.B @ pair.A).norm()) ** 2
        left[iterations] = distance
        assert report.changed_base
        assert report.figures["left"] < 1
    assert left[5] < left[1]
    with pytest.raises(UserError, match="replaced"):
        state_of(model)


@pytest.mark.parametrize("new", [2, 4, 7])
@pytest.mark.parametrize("scaling", [0.5, 2.0, -1.5])
def test_resizing_keeps_what_the_rank_can_hold(new: int, scaling: float) -> None:
    generator = torch.Generator().manual_seed(0)
    old = Factors(torch.randn(4, 30, generator=generator), torch.randn(20, 4, generator=generator))
    made, energy = resized(old, 1.5, new, scaling, generator)
    assert made.A.shape == (new, 30)
    wanted, got = 1.5 * old.B @ old.A, scaling * made.B @ made.A
    u, s, vt = torch.linalg.svd(wanted)
    best = (u[:, :new] * s[:new]) @ vt[:new] if new < 4 else wanted
    torch.testing.assert_close(got, best, atol=1e-4, rtol=1e-4)
    assert energy == pytest.approx(float(s[:new].pow(2).sum() / s.pow(2).sum()), abs=1e-5)
    if new > 4:
        assert made.A[4:].abs().sum() > 0, "rows that can learn"


def test_state_of_folds_what_modules_differ_by_into_b() -> None:
    model = peft_model(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6})
    shake(model)
    state: AdapterState = state_of(model)
    for name, pair in state.factors.items():
        layer = layers(model)[f"base_model.model.{name}"]
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(state.scaling * pair.B @ pair.A, expected)
