"""Initialisations: what each promises at step 0, against references, on random models."""

from __future__ import annotations

import copy
import json
import random
import sys
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import tiny
from loralab.adapters import LSLoraConfig, SineLoraConfig
from loralab.adapters.attach import attach
from loralab.adapters.extract import state_of
from loralab.adapters.inits import initialize, progressive
from loralab.adapters.inits.base import Facts
from loralab.adapters.inits.calibration import measure
from loralab.adapters.inits.initialize import options_of
from loralab.adapters.inits.progressive import callback_for
from loralab.adapters.inits.quantize import fake_quantize
from loralab.adapters.inits.warm import resized
from loralab.adapters.interop.nonlinear import open_nonlinear
from loralab.adapters.state import AdapterState, Factors
from loralab.adapters.true_base import base_changed, memory_of, true_base
from loralab.config import AdapterConfig, InitConfig
from loralab.errors import UserError
from loralab.gradient.fine_tune import trainable
from loralab.gradient.rows import prepare
from loralab.models.load import load
from loralab.registry import INITS

# By this name: the package has a function of the module's.
initialize_module = sys.modules["loralab.adapters.inits.initialize"]

RANK, ALPHA = 4, 8.0
EVERY_TYPE = "all-linear"
BLIND = ("zero_b", "tiny", "random", "orthogonal", "orthogonal_negative", "gaussian", "mica")
SPLITTING = ("pissa", "olora", "corda", "lora_ga")


def texts(count: int = 8, words: int = 40, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    pairs = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    return [" ".join(draw.choice(pairs) for _ in range(words)) for _ in range(count)]


def peft_model(kind: str = "llama", rank: int = RANK, **options: Any) -> Any:
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=EVERY_TYPE, **options)
    return get_peft_model(tiny.model(kind), config).eval()


def start(model: Any, name: str, **options: Any) -> Any:
    return initialize(model, name, tokenizer=tiny.tokenizer(), texts=texts(), **options)


def ids(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, tiny.VOCABULARY, (2, 17), generator=generator)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=ids()).logits  # type: ignore[no-any-return]


def layers(model: Any) -> dict[str, Any]:
    return {
        n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A
    }


def factors(model: Any) -> dict[str, Factors]:
    return {
        name: Factors(m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach())
        for name, m in layers(model).items()
    }


def shake(model: Any, size: float = 0.05) -> None:
    """Move every factor, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for pair in factors(model).values():
            for factor in pair:
                factor += size * torch.randn(factor.shape, generator=generator)


@pytest.mark.parametrize("name", sorted(set(INITS.names()) - {"warm_start"}))
def test_every_row_states_its_facts(name: str) -> None:
    facts = INITS.load(name).facts
    assert isinstance(facts, Facts)
    assert all((facts.formula, facts.source, facts.unchanged, facts.cost, facts.needs))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "name", ["zero_b", "orthogonal", "gaussian", "mica", "eva", "progressive", *SPLITTING]
)
def test_the_function_is_unchanged_at_step_0(name: str, kind: str) -> None:
    reference = logits(tiny.model(kind))
    model = peft_model(kind)
    if (name, kind) == ("olora", "gpt2"):
        with pytest.raises(UserError, match="Conv1D"):
            start(model, name)
        return
    start(model, name)
    exact = INITS.load(name).facts.unchanged.startswith("exactly")
    torch.testing.assert_close(
        logits(model), reference, atol=0 if exact else 2e-4, rtol=0 if exact else 1e-4
    )


@pytest.mark.parametrize("name", ["random", "orthogonal_negative"])
def test_what_is_broken_on_purpose_changes_the_function(name: str) -> None:
    model = peft_model()
    report = start(model, name)
    assert (logits(model) - logits(tiny.model("llama"))).abs().max() > 0.5
    assert min(report.relative_size.values()) > 0.03


@pytest.mark.parametrize("name", [*BLIND, "output_match", "eva", *SPLITTING])
def test_a_seed_gives_one_start_and_another_gives_another(name: str) -> None:
    def started(seed: int) -> Any:
        model = peft_model()
        torch.manual_seed(seed * 17 + 3)  # the global generator must not matter
        start(model, name, seed=seed)
        return factors(model)

    one, again, other = started(1), started(1), started(2)
    assert all(torch.equal(x, y) for n in one for x, y in zip(one[n], again[n], strict=True))
    if name not in ("mica", "pissa", "olora", "corda", "eva", "lora_ga"):  # these draw nothing
        assert any(not torch.equal(one[n].A, other[n].A) for n in one)


def test_equal_shapes_do_not_share_their_start() -> None:
    model = peft_model()
    start(model, "zero_b")
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for pair in factors(model).values():
        by_shape.setdefault(tuple(pair.A.shape), []).append(pair.A)
    assert any(len(same) > 1 for same in by_shape.values())
    for same in by_shape.values():
        assert len({tuple(a.flatten().tolist()) for a in same}) == len(same)


def test_zero_b_gaussian_has_three_times_the_variance_of_kaiming() -> None:
    sizes = {}
    for a in ("kaiming", "gaussian"):
        model = peft_model(rank=32)
        start(model, "zero_b", a=a)
        sizes[a] = sum(float(p.A.pow(2).sum()) for p in factors(model).values())
    assert sizes["gaussian"] / sizes["kaiming"] == pytest.approx(3, rel=0.05)


def test_tiny_is_random_scaled_once_for_each_factor() -> None:
    full, small = peft_model(), peft_model()
    start(full, "random")
    start(small, "tiny", scale=0.1)
    for name, pair in factors(full).items():
        torch.testing.assert_close(factors(small)[name].A, 0.1 * pair.A)
        torch.testing.assert_close(factors(small)[name].B, 0.1 * pair.B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_pairs_cancel_exactly_in_any_order(dtype: torch.dtype) -> None:
    model = peft_model(rank=32)
    start(model, "orthogonal")
    for a, b in factors(model).values():
        held_a, held_b = a.to(dtype).float(), b.to(dtype).float()
        assert torch.equal(held_a, a)
        assert torch.equal(held_b, b)
        assert a.abs().sum() > 0
        assert b.abs().sum() > 0
        for seed in range(3):
            order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
            total = torch.zeros(b.shape[0], a.shape[1])
            for k in order:  # one rank at a time: the least forgiving order of summation
                total += torch.outer(held_b[:, k], held_a[k])
            assert not total.any()
        gram = a[:16] @ a[:16].T
        torch.testing.assert_close(gram, torch.eye(16), atol=0.05, rtol=0)


def test_orthogonal_learns_through_both_factors_at_once() -> None:
    def gradients(name: str) -> tuple[float, float]:
        model = peft_model()
        start(model, name)
        model(input_ids=ids(), labels=ids()).loss.backward()
        found = [
            (m.lora_A["default"].weight.grad, m.lora_B["default"].weight.grad)
            for m in layers(model).values()
        ]
        return (
            sum(float(a.norm()) for a, _ in found),
            sum(float(b.norm()) for _, b in found),
        )

    assert gradients("zero_b")[0] == 0
    assert min(gradients("orthogonal")) > 0.01


def test_orthogonal_needs_an_even_rank() -> None:
    with pytest.raises(UserError, match="even rank"):
        start(peft_model(rank=3), "orthogonal")


def test_orthogonal_negative_is_minus_a_projector() -> None:
    model = peft_model()
    start(model, "orthogonal_negative")
    for layer in layers(model).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if a.shape[1] == b.shape[0]:
            change = (layer.scaling["default"] * b @ a).detach()
            torch.testing.assert_close(change @ change, -change, atol=1e-5, rtol=0)
            assert torch.linalg.matrix_norm(change) == pytest.approx(sqrt(RANK), rel=1e-4)


def test_svd_delta_gives_back_a_low_rank_change() -> None:
    base, tuned = tiny.model("llama"), tiny.model("llama")
    generator = torch.Generator().manual_seed(3)
    for name, module in tuned.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            out, width = module.weight.shape
            change = torch.randn(out, 3, generator=generator) @ torch.randn(
                3, width, generator=generator
            )
            module.weight.data += 0.01 * change
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=EVERY_TYPE)
    model = get_peft_model(base, config).eval()
    report = start(model, "svd_delta", reference=tuned)
    torch.testing.assert_close(logits(model), logits(tuned), atol=1e-3, rtol=1e-3)
    assert report.figures["energy"] == pytest.approx(1, abs=1e-4)


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


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_is_nearer_to_the_weight_the_more_turns_it_takes(bits: int) -> None:
    base = tiny.model("llama")
    left = {}
    for iterations in (1, 5):
        model = peft_model()
        report = start(model, "loftq", bits=bits, iterations=iterations)
        distance = 0.0
        for name, layer in layers(model).items():
            w = base.get_submodule(name.removeprefix("base_model.model.")).weight.data
            q = layer.get_base_layer().weight.data
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


def test_mica_freezes_b_and_learns_a() -> None:
    model = peft_model()
    start(model, "mica")
    with true_base(model):
        pass  # PEFT switches the adapters on again behind it
    for layer in layers(model).values():
        assert not layer.lora_B["default"].weight.requires_grad
        assert layer.lora_A["default"].weight.requires_grad


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


@pytest.mark.parametrize("new", [2, 4, 7])
@pytest.mark.parametrize("scaling", [0.5, 2.0])
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, of widths that bitsandbytes' CPU kernels take."""
    path = tmp_path_factory.mktemp("model")
    config = tiny.CONFIGS["llama"]()
    config.intermediate_size = 128
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


CAN_QUANTIZE = sorted(
    {n for n in INITS.names() if n != "warm_start" and INITS.load(n).facts.quantized}
)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("name", sorted(set(INITS.names()) - {"warm_start"}))
def test_a_quantised_base_is_started_or_refused_before_anything(
    name: str, bits: Any, folder: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    base, _ = load(folder, "float32", quantization=bits)
    full, _ = load(folder, "float32")
    before = logits(base)
    config = LoraConfig(r=32, lora_alpha=32, target_modules=EVERY_TYPE)
    model = get_peft_model(base, config).eval()
    options: dict[str, Any] = {}
    if name in ("loftq", "svd_delta", "quantization_match"):
        options = {"reference": str(folder)}
    if name not in CAN_QUANTIZE:
        with pytest.raises(UserError, match="quantised base"):
            start(model, name, **options)
        torch.testing.assert_close(logits(model), before)
        return
    report = start(model, name, **options)
    assert not report.changed_base
    assert torch.isfinite(logits(model)).all()
    if name in ("loftq", "quantization_match"):
        assert (logits(model) - logits(full)).norm() < (before - logits(full)).norm()
    if INITS.load(name).facts.unchanged.startswith("exactly"):
        torch.testing.assert_close(logits(model), before)


def test_loftq_says_what_a_quantised_base_needs(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base, _ = load(folder, "float32", quantization="nf4")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="reference"):
        start(model, "loftq")


def test_state_of_folds_what_modules_differ_by_into_b() -> None:
    model = peft_model(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6})
    shake(model)
    state: AdapterState = state_of(model)
    for name, pair in state.factors.items():
        layer = layers(model)[f"base_model.model.{name}"]
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(state.scaling * pair.B @ pair.A, expected)


def nonlinear_model(kind: str, **options: Any) -> Any:
    made = {"sine": SineLoraConfig, "spline": LSLoraConfig}[kind]
    config = made(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], **options)
    return get_peft_model(tiny.model("llama"), config).eval()


NEEDS_PLAIN = (*SPLITTING, "loftq", "mica", "svd_delta", "quantization_match", "output_match",
               "orthogonal_negative")  # fmt: skip


@pytest.mark.parametrize("name", [*NEEDS_PLAIN, "warm_start"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sine", {}),
        ("spline", {"interpolation_method": "soft"}),
        ("spline", {"normalize": "tanh"}),
        ("spline", {"output_scale_init": 0.5}),
        ("spline", {"spline_init": "bent"}),
        ("spline", {"spline_init": "bent", "space": "weight"}),
        ("spline", {"boundary": "clamp"}),
    ],
)
def test_a_start_that_rests_on_dw_being_s_ba_is_refused_elsewhere(
    kind: str, options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    model = nonlinear_model(kind, **options)
    shake(model)
    before = logits(model)
    given: dict[str, Any] = {"path": str(tmp_path)} if name == "warm_start" else {}
    if name in ("svd_delta", "quantization_match"):
        given = {"reference": tiny.model("llama", seed=1)}
    with pytest.raises(UserError, match=rf"{name} (needs dW = s BA|is for plain LoRA)"):
        start(model, name, **given)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"space": "weight"}])
def test_a_spline_that_is_the_identity_takes_what_plain_lora_takes(options: Any) -> None:
    model = nonlinear_model("spline", **options)
    plain = get_peft_model(
        tiny.model("llama"),
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"]),
    ).eval()
    for made in (model, plain):
        start(made, "svd_delta", reference=tiny.model("llama", seed=1))
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_spline["default"].values.add_(0.5)
            if options.get("gated"):
                layer.lora_spline["default"].gate.add_(1)
    with pytest.raises(UserError, match="needs dW"):
        start(model, "svd_delta", reference=tiny.model("llama", seed=1))


@pytest.mark.parametrize("kind", ["sine", "spline"])
@pytest.mark.parametrize("name", [*SPLITTING, "loftq", "mica"])
def test_what_could_not_be_saved_afterwards_is_refused_before(name: str, kind: str) -> None:
    model = nonlinear_model(kind)
    with pytest.raises(UserError, match=f"{name} is for plain LoRA.*cannot be saved"):
        start(model, name)
    start(model, "zero_b")
    start(model, "eva")
    assert torch.equal(logits(model), logits(tiny.model("llama")))


def test_progressive_refuses_for_its_start_as_well() -> None:
    with pytest.raises(UserError, match="start orthogonal_negative needs dW"):
        start(nonlinear_model("sine"), "progressive", start="orthogonal_negative")


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


def test_a_base_that_peft_changed_goes_on_being_marked() -> None:
    model = peft_model(init_lora_weights="pissa")
    start(model, "zero_b")
    assert model.peft_config["default"].init_lora_weights == "pissa"


def test_options_of_a_config() -> None:
    init = InitConfig(name="eva", options={"texts": ["mine"], "rho": 2})
    assert options_of(init, ["the run's"]) == {"texts": ["mine"], "rho": 2}
    assert options_of(InitConfig(name="eva"), ["a"]) == {"texts": ["a"]}
    for option in ("seed", "tokenizer", "adapter"):
        with pytest.raises(UserError, match=rf"options\.{option} is 3"):
            options_of(InitConfig(name="eva", options={option: 3}), [])
    with pytest.raises(UserError, match="texts is 5"):
        initialize(peft_model(), "eva", tokenizer=tiny.tokenizer(), texts=5)  # type: ignore[arg-type]


class Notes:
    """A run directory as `trainable` sees it."""

    def note(self, **values: Any) -> None:
        vars(self).update(values)


def trained_from(**adapter: Any) -> Any:
    section = AdapterConfig.model_validate({"rank": RANK, "alpha": ALPHA, **adapter})
    tokenizer = tiny.tokenizer()
    tokenizer.decode = lambda ids, **_: " ".join(tokenizer.convert_ids_to_tokens(ids))
    rows = prepare([("aa bb", text, "row") for text in texts()], tokenizer, 99).rows
    config: Any = SimpleNamespace(adapter=section, seed=3, model="base")
    return trainable(tiny.model("llama"), tokenizer, config, rows, Notes())  # type: ignore[arg-type]


def test_a_config_s_texts_and_zero_b_s_options_are_used() -> None:
    own = {"name": "eva", "options": {"texts": texts(seed=9)}}
    used, other = trained_from(init=own), trained_from(init={"name": "eva"})
    plain = attach(tiny.model("llama"), AdapterConfig(rank=RANK, alpha=ALPHA), 3)
    initialize(plain, "eva", tokenizer=tiny.tokenizer(), texts=texts(seed=9), seed=3)
    key = next(iter(layers(used)))
    assert torch.equal(factors(used)[key].A, factors(plain)[key].A)
    assert not torch.equal(factors(other)[key].A, factors(plain)[key].A)
    with pytest.raises(UserError, match=r"options\.seed"):
        trained_from(init={"name": "eva", "options": {"seed": 1}})
    gaussian = trained_from(init={"name": "zero_b", "options": {"a": "gaussian"}})
    a = torch.cat([pair.A.flatten() * sqrt(pair.A.shape[1]) for pair in factors(gaussian).values()])
    assert float(a.std()) == pytest.approx(1, abs=0.05), "kaiming's is 0.58"


@pytest.mark.parametrize("kind", ["lslora", "sinelora"])
def test_a_config_that_would_lose_its_run_at_the_end_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="pissa is for plain LoRA"):
        trained_from(type=kind, init={"name": "pissa"})


@pytest.mark.parametrize("mark", ["pissa", "PISSA_niter_4", "olora", "corda", "lora_ga", "loftq"])
@pytest.mark.parametrize("kind", ["sine", "spline"])
def test_a_nonlinear_adapter_of_a_changed_base_is_not_opened(
    kind: str, mark: str, tmp_path: Path
) -> None:
    nonlinear_model(kind).save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    open_nonlinear(tmp_path, config, tiny.model("llama"))
    with pytest.raises(UserError, match=f"init_lora_weights is '{mark}'.*base"):
        open_nonlinear(tmp_path, config | {"init_lora_weights": mark}, tiny.model("llama"))
