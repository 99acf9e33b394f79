"""Native operations of a layer compute what PyTorch's do, in fp32 to rounding, in bf16 nearer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from layer_samples import draw, off, way
from loralab.engines.native import build
from loralab.gradient.attention import sequence_attention
from loralab.gradient.layer_functions import RotaryAttention, Rotation, rms_norm, swiglu
from loralab.gradient.loss import cross_entropy
from loralab.gradient.native import attention as native_attention
from loralab.gradient.native import layers as native
from loralab.gradient.native import parallel
from loralab.gradient.native import spline as native_spline
from loralab.gradient.native.switch import wanted
from loralab.gradient.plain_layers import PlainLayers
from loralab.gradient.spline_curve import Parameters
from loralab.models.rope import angles, rotate

assert way

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler")


LENGTHS = (1, 7, 63, 64, 65, 130)


Operation = Callable[..., Tensor]


def results(operation: Operation, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the inputs' gradients, in float32, of inputs rounded to bf16."""
    given = [t.bfloat16().to(dtype).requires_grad_() for t in inputs]
    out = operation(*given)
    out.backward(draw(*out.shape, seed=99).bfloat16().to(dtype))
    return [out.detach().float(), *(t.grad.float() for t in given if t.grad is not None)]


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


def test_what_pytorch_makes_by_default_is_not_what_the_kernels_write_into() -> None:
    x, weight, gy = draw(300, 96), draw(96, seed=1), draw(300, 96, seed=2)
    logits, targets = draw(9, 64), torch.arange(9)
    q, k, v = (t.bfloat16() for t in heads(32, (5, 70)))
    z, spline = (
        draw(40, 64),
        Parameters(
            draw(5), torch.tensor([1.3]), torch.tensor([-0.8]), None, -1.5, 2.0, clamp=False
        ),
    )
    layers, attention, splines = native.kernels(), native_attention.kernel(), native_spline.kernel()
    assert layers is not None
    assert attention is not None
    assert splines is not None

    def made() -> list[Tensor | None]:
        y, inverse = layers.norm_forward(x, weight, 1e-5)
        out, sums = attention.forward(q, k, v, 0.3, (5, 70))
        return [
            *(y, inverse, out, sums),
            *layers.norm_backward(x, weight, inverse, gy, True),
            *attention.backward(q, k, v, 0.3, (5, 70), out, sums, q),
            layers.cross_entropy(logits.clone(), targets, True),
            *splines.backward(z.clone(), gy[:40, :64].contiguous(), spline),
        ]

    expected = made()
    torch.set_default_dtype(torch.float64)
    try:
        found = made()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_kernels_write_into_memory_of_the_cpu() -> None:
    """Elsewhere the address would be a device's: the library is a stand-in, or it would crash."""
    given = Parameters(
        draw(5), torch.tensor([1.3]), torch.tensor([-0.8]), None, -1.5, 2.0, clamp=False
    )
    layers, q = native.LayerKernels(MagicMock()), draw(12, 2, 32).bfloat16()
    attention, x = native_attention.AttentionKernel(MagicMock()), draw(8, 32)
    splines = native_spline.SplineKernel(
        MagicMock(**{f"ll_spline_{n}.return_value": 64 for n in ("block", "most", "rows")})
    )
    with torch.device("meta"):
        made = [
            *layers.norm_forward(x, x[0], 1e-5),
            *layers.norm_backward(x, x[0], x[:, 0], x, True),
            layers.cross_entropy(x, x[:, 0].long(), True),
            *attention.forward(q, q, q, 0.3, (12,)),
            splines.product_forward(x.bfloat16(), x.bfloat16(), given),
            splines.backward(x, x, given)[1],
        ]
    assert [t.device.type for t in made if t is not None] == ["cpu"] * 9


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
