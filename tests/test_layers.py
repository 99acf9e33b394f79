"""Native layers compute what PyTorch's do, in fp32 to rounding, in bf16 nearer to fp32."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional

import tiny
from loralab.adapters import LSLoraConfig
from loralab.engines.native import build
from loralab.gradient import fast
from loralab.gradient.attention import NAME, named_attention, sequence_attention
from loralab.gradient.collate import flatten, pad
from loralab.gradient.layer_functions import RotaryAttention, Rotation, rms_norm, swiglu
from loralab.gradient.layers import fused_layers
from loralab.gradient.lora_function import Remade
from loralab.gradient.loss import cross_entropy, labelled_head
from loralab.gradient.native import attention as native_attention
from loralab.gradient.native import layers as native
from loralab.gradient.native import parallel
from loralab.gradient.native.switch import plain_pytorch, wanted
from loralab.gradient.plain_layers import PlainLayers
from loralab.gradient.rows import IGNORED, Row
from loralab.models.decoder import DecoderConfig, DecoderForCausalLM
from loralab.models.rope import angles, rotate

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler")

LENGTHS = (1, 7, 63, 64, 65, 130)
Operation = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(operation: Operation, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the inputs' gradients, in float32, of inputs rounded to bf16."""
    given = [t.bfloat16().to(dtype).requires_grad_() for t in inputs]
    out = operation(*given)
    out.backward(draw(*out.shape, seed=99).bfloat16().to(dtype))
    return [out.detach().float(), *(t.grad.float() for t in given if t.grad is not None)]


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.double().norm())


def fused() -> Any:
    return native.kernels() if wanted() else PlainLayers()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(fused(), x, weight, 1e-5)


def stock_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float() if x.dtype == torch.bfloat16 else x
    made = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * made.to(x.dtype)


def activation(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu(fused(), gate, up)


def stock_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


COS, SIN = angles(torch.arange(37)[None] * 3, 64, 10000.0)


def turned(x: Tensor) -> Tensor:
    tables = (t[0, :, :32].contiguous() for t in (COS, SIN))
    out: Tensor = Rotation.apply(native.kernels(), x, *tables)  # type: ignore[no-untyped-call]
    return out


def stock_turned(x: Tensor) -> Tensor:
    return rotate(x[None].transpose(1, 2), COS, SIN).transpose(1, 2)[0]


OPERATIONS: dict[str, tuple[Operation, Operation, list[Tensor]]] = {
    "norm": (norm, stock_norm, [3 * draw(300, 96), 1 + 0.3 * draw(96, seed=1)]),
    "swiglu": (activation, stock_swiglu, [4 * draw(37, 48), draw(37, 48, seed=1)]),
    "rotation": (turned, stock_turned, [draw(37, 3, 64)]),
}


@pytest.fixture(params=["native", "plain"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with plain_pytorch() if request.param == "plain" else nullcontext():
        yield request.param


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_pytorch_in_fp32(name: str, way: str) -> None:
    ours, stock, inputs = OPERATIONS[name]
    exact = results(stock, inputs, torch.float64)
    for found, value in zip(results(ours, inputs, torch.float32), exact, strict=True):
        assert off(found, value) < 1e-6


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_in_bf16_are_nearer_to_fp32_than_pytorch(name: str, way: str) -> None:
    ours, stock, inputs = OPERATIONS[name]
    exact = results(stock, inputs, torch.float64)
    for found, plain, value in zip(
        results(ours, inputs, torch.bfloat16),
        results(stock, inputs, torch.bfloat16),
        exact,
        strict=True,
    ):
        assert off(found, value) <= off(plain, value) * 1.001
        assert off(found, value) < 2.5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [64, 67])
def test_cross_entropy_and_its_gradient(dtype: torch.dtype, vocabulary: int) -> None:
    logits = (5 * draw(9, vocabulary)).to(dtype)
    targets = torch.arange(9) * 7 % vocabulary
    exact = logits.double().requires_grad_()
    losses = functional.cross_entropy(exact, targets, reduction="none")
    losses.sum().backward()
    assert exact.grad is not None
    found, nothing = cross_entropy(logits.clone(), targets, slopes=False)
    assert nothing is None
    again, slope = cross_entropy(logits.clone(), targets, slopes=True)
    assert torch.equal(found, again)
    assert slope is not None
    assert (found - losses.detach()).abs().max() < 2e-6 * float(losses.detach().max())
    assert (slope - exact.grad).abs().max() < (1e-6 if dtype == torch.float32 else 4e-3)


def test_cross_entropy_of_what_is_not_finite_is_not_finite_and_labels_are_checked() -> None:
    logits = draw(2, 40)
    logits[0, 33] = torch.nan
    losses, _ = cross_entropy(logits.clone(), torch.tensor([1, 1]), slopes=False)
    assert losses[0].isnan()
    assert losses[1].isfinite()
    narrow, _ = cross_entropy(logits.clone(), torch.tensor([1, 2], dtype=torch.int32), slopes=False)
    assert narrow[1] == cross_entropy(logits.clone(), torch.tensor([1, 2]), slopes=False)[0][1]
    for wrong in (-1, 40):
        with pytest.raises(IndexError, match="outside the vocabulary of 40"):
            cross_entropy(draw(1, 40), torch.tensor([wrong]), slopes=True)


def heads(width: int, lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    tokens = sum(lengths)
    return [draw(tokens, 6, width), draw(tokens, 2, width, seed=1), draw(tokens, 2, width, seed=2)]


def attend(lengths: Sequence[int]) -> Operation:
    positions = torch.cat([torch.arange(n) for n in lengths])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = (t[:, : q.shape[-1] // 2] for t in angles(positions, q.shape[-1], 1e4))
        out: Tensor = RotaryAttention.apply(  # type: ignore[no-untyped-call]
            native.kernels(),
            native_attention.kernel(),
            *(q, k, v, cos.contiguous(), sin.contiguous(), q.shape[-1] ** -0.5, tuple(lengths)),
        )
        return out

    return ours


def stock_attend(lengths: Sequence[int]) -> Operation:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = angles(positions, q.shape[-1], 1e4)
        parts = [t[None].transpose(1, 2) for t in (q, k, v)]
        parts[:2] = [rotate(part, cos, sin) for part in parts[:2]]
        return sequence_attention(
            SimpleNamespace(),
            *parts,
            None,
            sequence_lengths=tuple(lengths),  # type: ignore[arg-type]
        )[0][0]

    return stock


@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_attention_is_as_near_to_fp32_as_pytorchs(width: int) -> None:
    inputs = heads(width)
    exact = results(stock_attend(LENGTHS), inputs, torch.float64)
    stock = results(stock_attend(LENGTHS), inputs, torch.bfloat16)
    ours = results(attend(LENGTHS), inputs, torch.bfloat16)
    for found, plain, value in zip(ours, stock, exact, strict=True):
        assert off(found, value) < 1.05 * off(plain, value)
        assert off(found, value) < 6e-3


def test_attention_reads_nothing_beyond_its_inputs() -> None:
    kernel = native_attention.kernel()
    assert kernel is not None
    q, k, v = (t.bfloat16() for t in heads(32, (5, 7)))
    for keys, lengths in ((k, (5, 8)), (k[:-1], (5, 7))):
        with pytest.raises(ValueError, match="sequences of"):
            kernel.forward(q, keys, v, 0.3, lengths)


def test_positions_over_a_part_of_the_head_go_to_the_class() -> None:
    model = causal("llama", torch.bfloat16).eval()
    ids = torch.arange(12)[None]
    layer = model.model.layers[0].self_attn
    x = draw(1, 12, 128).bfloat16()
    cos, sin = (t[..., :16] for t in angles(torch.arange(12)[None], 32, 1e4))
    with named_attention(model, NAME), fused_layers(model):
        model(input_ids=ids, sequence_lengths=(12,))
        with pytest.raises(RuntimeError, match="size of tensor"):  # Llama's own word for it
            layer(x, (cos, sin), None, sequence_lengths=(12,))


def test_a_sequence_attends_to_itself_alone() -> None:
    inputs = heads(32, (40, 70, 30))
    whole = results(attend((40, 70, 30)), inputs, torch.bfloat16)
    changed = [t.clone() for t in inputs]
    for t in changed:
        t[:40], t[110:] = t[:40].flip(0), 3.0
    again = results(attend((40, 70, 30)), changed, torch.bfloat16)
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one[40:110], other[40:110])
        assert not torch.equal(one[:40], other[:40])


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PARALLEL", 1)
    made = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(
                [
                    *results(attend(LENGTHS), heads(64), torch.bfloat16),
                    *results(norm, OPERATIONS["norm"][2], torch.bfloat16),
                    *results(activation, OPERATIONS["swiglu"][2], torch.float32),
                    *results(turned, OPERATIONS["rotation"][2], torch.float32),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


SHAPE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SHAPE),
    "qwen2": lambda: tf.Qwen2Config(**SHAPE),
    "qwen3": lambda: tf.Qwen3Config(**SHAPE, head_dim=32),
    "mistral": lambda: tf.MistralConfig(**SHAPE, sliding_window=50),
    "decoder": lambda: DecoderConfig(**SHAPE),
    "decoder-fused": lambda: DecoderConfig(**SHAPE, attention="fused"),
}


def causal(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    config = MODELS[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = (
            DecoderForCausalLM(config)
            if isinstance(config, DecoderConfig)
            else tf.AutoModelForCausalLM.from_config(config)
        )
        for parameter in made.parameters():
            parameter.data = (
                0.15 * torch.randn_like(parameter)
                if parameter.dim() > 1
                else 1 + 0.2 * torch.randn_like(parameter)
            ).bfloat16()
    return made.to(dtype).train()


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (5, 33, 12):
        ids = tuple(torch.randint(67, (length,), generator=generator).tolist())
        made.append(Row(ids, (IGNORED, IGNORED, *ids[2:])))
    return made


def step(model: Any, fused: bool) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    layers = fused_layers(model) if fused else nullcontext()
    with labelled_head(model), named_attention(model, NAME), layers:
        loss = model(**flatten(rows()))["loss"]
        loss.backward()
    return float(loss.detach()), {n: p.grad.float().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_with_fused_layers_is_the_stock_step(kind: str, way: str) -> None:
    model = causal(kind)
    model.zero_grad()
    stock_loss = model(**pad(rows(), 0)).loss
    stock_loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss, found = step(model, fused=True)
    assert loss == pytest.approx(float(stock_loss), abs=2e-6)
    for name, gradient in wanted.items():
        assert off(found[name], gradient) < 2e-5, name


@pytest.mark.parametrize("kind", MODELS)
def test_a_bf16_step_with_fused_layers_is_nearer_to_fp32(kind: str, way: str) -> None:
    _, exact = step(causal(kind), fused=False)
    loss, plain = step(causal(kind, torch.bfloat16), fused=False)
    other_loss, found = step(causal(kind, torch.bfloat16), fused=True)
    assert other_loss != loss  # the fused layers did run

    def error(gradients: dict[str, Tensor]) -> float:
        return float(sum((gradients[n] - g).square().sum() for n, g in exact.items())) ** 0.5

    # One model of random weights: errors of both kinds vary by a fifth from seed to seed.
    assert error(found) < 1.25 * error(plain)


def test_every_known_layer_is_taken_and_given_back() -> None:
    model = causal("llama")
    with fused_layers(model) as report:
        assert report.taken == {"LlamaRMSNorm": 5, "LlamaMLP": 2, "LlamaAttention": 2}
        assert not report.left
        assert not report.notes
    assert all("forward" not in vars(module) for module in model.modules())
    with fused_layers(tiny.model("gemma3")) as report:
        assert not report.taken
        assert report.left["Gemma3MLP"] == 2
        assert "Gemma3RMSNorm" in report.notes[0]


def test_calls_beyond_training_go_to_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window shorter than a sequence, a cache, padding: as without the kernels."""
    model = causal("mistral").eval()
    ids = torch.arange(60)[None] % 67
    plain = model(input_ids=ids, use_cache=True).logits
    with fused_layers(model):
        assert off(model(input_ids=ids, use_cache=True).logits, plain) < 1e-5
        with named_attention(model, NAME):
            monkeypatch.setattr(RotaryAttention, "apply", None)  # must not be reached
            model(input_ids=ids, sequence_lengths=(60,))


def test_adapters_in_the_projections_are_trained() -> None:
    base = causal("llama", torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * draw(*parameter.shape)
    with labelled_head(base), named_attention(base, NAME), fused_layers(model):
        model(**flatten(rows()))["loss"].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


@pytest.mark.parametrize("spline", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_inputs_that_can_be_made_again_are_not_kept(
    spline: bool, checkpointing: bool, way: str
) -> None:
    """Gradients are the same bits, and neither norms nor activations wait for backward."""

    def gradients(marked: bool) -> tuple[list[Tensor], int]:
        base = causal("llama")
        kind = LSLoraConfig if spline else LoraConfig
        model = get_peft_model(base, kind(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data = 0.1 * draw(*parameter.shape)
        fast.patch(model)
        if checkpointing:
            model.enable_input_require_grads()
            base.gradient_checkpointing_enable()
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with (
            labelled_head(base),
            named_attention(base, NAME),
            fused_layers(model),
            pytest.MonkeyPatch.context() as patch,
        ):
            if not marked:
                patch.setattr(Remade, "of", staticmethod(lambda x: None))
            with nullcontext() if checkpointing else hooks:
                loss = model(**flatten(rows()))["loss"]
            loss.backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        return found, sum(kept.values())

    ours, small = gradients(marked=True)
    plain, large = gradients(marked=False)
    assert len(ours) == 14 * (5 if spline else 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    if not checkpointing:
        # All norms' outputs and activations but for one input more, the embeddings.
        tokens, layers = 50, 2
        assert large - small > 0.99 * 4 * tokens * (layers * (2 * 128 + 96) - 128)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-march=x86-64-v3", "-march=x86-64"])
def test_kernels_for_lesser_processors_agree(flag: str, tmp_path: Path) -> None:
    if "x86" not in build.platform.machine():
        pytest.skip("the flags are for x86-64")
    lengths, layers = (1, 7, 70), native.kernels()
    made = []
    for module in (native, native_attention):
        target = tmp_path / f"{module.__name__}.so"
        build.compile_library(build.find_compiler(), target, flag, module.SOURCE)
        made.append(module.declare(ctypes.CDLL(str(target))))
    lesser, kernel = native.LayerKernels(made[0]), native_attention.AttentionKernel(made[1])
    here = native_attention.kernel()
    assert layers is not None
    assert here is not None
    x, weight, gy = (draw(9, 48, seed=n).bfloat16() for n in range(3))
    y, inverse = lesser.norm_forward(x, weight[0].float(), 1e-5)
    assert off(y, layers.norm_forward(x, weight[0].float(), 1e-5)[0]) < 1e-3
    found = lesser.norm_backward(x, weight[0].float(), inverse, gy, True)
    wanted = layers.norm_backward(x, weight[0].float(), inverse, gy, True)
    assert all(off(a, b) < 1e-3 for a, b in zip(found, wanted, strict=True))  # type: ignore[arg-type]
    assert off(lesser.swiglu_forward(x, weight), layers.swiglu_forward(x, weight)) < 1e-3
    logits, targets = draw(4, 35), torch.tensor([0, 34, 7, 12])
    assert (
        off(
            lesser.cross_entropy(logits.clone(), targets, True),
            layers.cross_entropy(logits.clone(), targets, True),
        )
        < 1e-6
    )
    q, k, v = (t.bfloat16() for t in heads(48, lengths))
    out, sums = kernel.forward(q, k, v, 0.3, lengths)
    assert off(out, here.forward(q, k, v, 0.3, lengths)[0]) < 2e-3
    of_out = draw(*q.shape, seed=4).bfloat16()
    inputs = (q, k, v, 0.3, lengths, out, sums, of_out)
    for a, b in zip(kernel.backward(*inputs), here.backward(*inputs), strict=True):
        assert off(a, b) < 3e-3
