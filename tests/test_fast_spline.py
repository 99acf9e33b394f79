"""The fast LS-LoRA step against the adapter's own forward and autograd."""

from __future__ import annotations

import copy
import ctypes
import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fast_models import adapted, assert_close, randomize, results, sample, with_small_update
from loralab.adapters import LSLoraConfig
from loralab.adapters.knots import knot_positions
from loralab.adapters.spline import LoraSpline, OutsideCount
from loralab.engines.native import build
from loralab.gradient import fast, spline_curve, spline_function
from loralab.gradient.native import spline as native
from loralab.gradient.native.spline import SplineKernel
from loralab.gradient.spline_curve import Curve, Parameters

GRID = {"k_min": -1.5, "k_max": 2.0}


def spline_adapted(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return adapted(dtype, LSLoraConfig, **{**GRID, **options})


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to run the function; each test that takes it runs on both."""
    if request.param == "torch":
        monkeypatch.setattr(spline_function, "kernel", lambda: None)
    elif native.kernel() is None:
        pytest.skip("no C++ compiler")
    return str(request.param)


def assert_same_as_autograd(model: Any, taken: int, **sampled: Any) -> None:
    x, weights = sample(**sampled)
    expected = results(model, x, weights)
    fast.patch(model)
    assert len(fast.report(model).taken) == taken
    assert_close(results(model, x, weights), expected)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("boundary", ["extrapolate", "clamp"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("knots", [2, 3, 5, 12])
def test_equal_to_autograd_in_fp32(knots: int, gated: bool, boundary: str) -> None:
    model = spline_adapted(num_knots=knots, gated=gated, boundary=boundary)
    x, _ = sample()
    layer = model.base_model.model.first
    layer.lora_spline["default"].outside = count = OutsideCount()
    model(x)
    layer.lora_spline["default"].outside = None
    assert 0.02 < count.share < 0.98  # inputs on both sides of the grid's ends
    assert_same_as_autograd(model, taken=2)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("rows", [(7,), (2, 3, 4), (0,), (1,)])
def test_shapes_of_input(rows: tuple[int, ...]) -> None:
    assert_same_as_autograd(spline_adapted(), taken=2, rows=rows)


@pytest.mark.usefixtures("path")
def test_every_parameter_gets_a_gradient_of_its_shape() -> None:
    model = fast.patch(spline_adapted(gated=True))
    found = results(model, *sample())
    assert len(found) == 2 + 2 * 6
    for name, parameter in model.named_parameters():
        if name in found:
            assert found[name].shape == parameter.shape
            assert found[name].abs().max() > 1e-3, name


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_spline_is_plain_lora_bit_for_bit(dtype: torch.dtype) -> None:
    plain, spline = adapted(dtype), adapted(dtype, LSLoraConfig)
    for model in (plain, spline):
        for name, parameter in model.named_parameters():
            if "lora_spline" not in name:
                torch.manual_seed(len(name.replace("default", "")) % 97)
                parameter.data = torch.randn(parameter.shape).to(parameter.dtype)
    spline.base_model.model.second.lora_spline["default"] = type(
        spline.base_model.model.second.lora_spline["default"]
    )(LSLoraConfig())
    x = sample(dtype)[0].new_tensor(torch.randn(9, 40).tolist()).requires_grad_()
    outcomes = []
    for model in (plain, spline):
        layer = fast.patch(model).base_model.model.second
        assert len(fast.report(model).taken) == 2
        y = layer(x)
        outcomes.append([y, *torch.autograd.grad(y.float().square().sum(), [x])])
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.usefixtures("path")
def test_bf16_is_near_to_fp32() -> None:
    exact = with_small_update(spline_adapted(gated=True))
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()  # the same numbers in both types
    rough = copy.deepcopy(exact)
    for name, parameter in rough.named_parameters():
        if "base_layer" in name:
            parameter.data = parameter.data.bfloat16()
    x, weights = sample(torch.bfloat16, rows=(400,))
    reference = results(exact, x.float(), weights)
    autograd = results(rough, x, weights)
    ours = results(fast.patch(rough), x, weights)

    def error(found: dict[str, Tensor], name: str) -> float:
        return float((found[name].float() - reference[name]).norm() / reference[name].norm())

    assert error(ours, "y") < 0.9 * error(autograd, "y")
    for name in reference:
        assert ours[name].dtype == autograd[name].dtype
        assert error(ours, name) < max(0.015, 1.5 * error(autograd, name)), name


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("rank", [6, 8, 16, 32])
def test_bf16_layer_at_the_ranks_the_kernel_multiplies_itself(rank: int) -> None:
    torch.manual_seed(rank)
    x, weight = torch.randn(300, 48), torch.randn(64, 48) / 7
    a, b = torch.randn(rank, 48) / 7, torch.randn(64, rank) / rank**0.5
    spline = LoraSpline(LSLoraConfig(num_knots=6))
    for parameter in spline.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    towards, outcomes = torch.randn(300, 64), []
    given = [tensor.bfloat16().float() for tensor in (x, weight, a, b)]
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, a, b = (tensor.to(dtype) for tensor in given)
        leaves = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
        if dtype == torch.float32:  # autograd's own
            y = x @ weight.t() + spline(1.5 * (x @ a.t() @ b.t()))
        else:
            y = spline_function.ls_lora_linear(x, weight, None, a, b, 1.5, spline)
        gradients = torch.autograd.grad(
            (y.float() * towards).sum(), [*leaves, *spline.parameters()]
        )
        outcomes.append([y, *gradients])
    for wanted, found in zip(*outcomes, strict=True):
        # A scale's gradient is one sum in which most of its 19,200 terms cancel.
        share = 0.03 if wanted.numel() > 1 else 0.1
        assert (found.float() - wanted).norm() < share * wanted.norm()


@pytest.mark.usefixtures("path")
def test_parameters_in_bf16() -> None:
    model = with_small_update(spline_adapted()).bfloat16()
    x, weights = sample(torch.bfloat16, rows=(200,))
    expected = results(copy.deepcopy(model).float(), x.float(), weights)
    autograd = results(model, x, weights)
    found = results(fast.patch(model), x, weights)
    assert len(fast.report(model).taken) == 2
    for name, wanted in expected.items():
        assert found[name].dtype == torch.bfloat16
        rounding = (autograd[name] - wanted).norm()
        assert (found[name] - wanted).norm() < 1.5 * rounding + 0.01 * wanted.norm(), name


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_and_gradient_checkpointing(reentrant: bool) -> None:
    model = spline_adapted(lora_dropout=0.3).train()
    x, weights = sample()
    expected = results(model, x, weights)
    fast.patch(model)

    def call(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    assert_close(results(model, x, weights), expected)
    assert_close(results(model, x, weights, call), expected)


@pytest.mark.usefixtures("path")
def test_autocast() -> None:
    model = with_small_update(spline_adapted())
    x, weights = sample()
    exact = results(model, x, weights)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = model(x)
            return result

    autograd = results(model, x, weights, call)
    ours = results(fast.patch(model), x, weights, call)
    for name, wanted in exact.items():
        assert ours[name].dtype == autograd[name].dtype
        rounding = (autograd[name] - wanted).norm()
        assert (ours[name] - wanted).norm() < 1.5 * rounding + 0.01 * wanted.norm(), name


def test_gradcheck_in_fp64() -> None:
    model = spline_adapted(gated=True).double()
    fast.patch(model)
    assert len(fast.report(model).taken) == 2
    named = {n: p for n, p in model.named_parameters() if "lora_" in n}
    x = sample()[0].double().requires_grad_()

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(
            model, dict(zip(named, parameters, strict=True)), x
        )
        return found

    assert torch.autograd.gradcheck(call, (x, *named.values()))


def test_backward_keeps_the_input_once_and_nothing_else_of_its_size() -> None:
    model = fast.patch(spline_adapted(torch.bfloat16))
    x = sample(torch.bfloat16, rows=(300,))[0].requires_grad_()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() > 300 * 4:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model.model.first(x)
    assert [(t.shape, t.dtype) for t in kept.values()] == [(x.shape, torch.bfloat16)]


@pytest.mark.usefixtures("path")
def test_gradient_of_a_sum_is_not_contiguous() -> None:
    model = spline_adapted()
    x = sample()[0].requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    found = torch.autograd.grad(fast.patch(model)(x).sum(), x)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"space": "weight"}, "spline on weights"),
        ({"interpolation_method": "soft"}, "spline is soft"),
        ({"normalize": "tanh"}, "normalize tanh"),
    ],
)
def test_other_splines_fall_back(options: dict[str, Any], reason: str) -> None:
    model = spline_adapted(**options)
    assert_same_as_autograd(model, taken=0)
    assert all(reason in why for why in fast.report(model).left.values())


def test_counting_inputs_falls_back() -> None:
    model = fast.patch(spline_adapted())
    spline = model.base_model.model.first.lora_spline["default"]
    spline.outside = OutsideCount()
    model(sample()[0])
    assert spline.outside.seen == 15 * 40
    assert fast.report(model).taken == ("base_model.model.second",)


def test_plain_lora_beside_a_spline() -> None:
    model = spline_adapted()
    model.base_model.add_adapter = None  # type: ignore[assignment]
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.update_layer("plain", 2, 3, config=LoraConfig(r=2, lora_alpha=3))
        layer.set_adapter("plain")
    randomize(model)
    assert_same_as_autograd(model, taken=2)


def test_without_a_compiler_it_runs_in_torch_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none() -> str:
        raise build.NativeUnavailableError("no C++ compiler found")

    monkeypatch.setattr(build, "find_compiler", none)
    native.kernel.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert_same_as_autograd(spline_adapted(), taken=2)
    finally:
        native.kernel.cache_clear()
    assert caplog.text.count("no C++ compiler found") == 1


def bent(knots: int = 5, gated: bool = False, clamp: bool = False) -> Parameters:
    torch.manual_seed(knots)
    gate = torch.tensor([0.3]) if gated else None
    scales = torch.tensor([1.3]), torch.tensor([-0.8])
    values = knot_positions(knots, -1.5, 2.0) + torch.randn(knots) * 0.5
    return Parameters(values, *scales, gate, -1.5, 2.0, clamp)


@pytest.fixture(
    scope="module",
    params=["-march=native", "-march=x86-64-v3", "-march=x86-64"],
)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernel compiled for this processor and for lesser ones."""
    here = native.kernel()
    if here is None:
        pytest.skip("no C++ compiler")
    if request.param == "-march=native":
        return here
    if "x86" not in build.platform.machine():
        pytest.skip("the flags are for x86-64")
    target = tmp_path_factory.mktemp("kernel") / "spline.so"
    build.compile_library(build.find_compiler(), target, request.param, native.SOURCE)
    return SplineKernel(native.declare(ctypes.CDLL(str(target))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_agrees_with_torch(kernel: SplineKernel, dtype: torch.dtype) -> None:
    for count in (1, 15, 16, 33, 16384, 16384 * 3 + 5):
        for given in (bent(), bent(12, gated=True), bent(4, clamp=True), bent(64)):
            z, gy = torch.randn(count).to(dtype), torch.randn(count).to(dtype)
            assert kernel.takes(z, given)
            ulp = 2**-7 if dtype == torch.bfloat16 else 1e-5
            out = kernel.forward(z.clone(), given)
            torch.testing.assert_close(
                out, spline_curve.forward(z, given.curve()), atol=1e-5, rtol=ulp
            )
            expected = spline_curve.backward(z.double(), gy.double(), double(given))
            gz, gradients = kernel.backward(z.clone(), gy, given)
            torch.testing.assert_close(gz, expected[0].to(dtype), atol=1e-5, rtol=ulp)
            size = float(gy.float().abs().sum()) + 1
            # Sums of tens of thousands of terms in bf16's inputs, fp32's accuracy.
            torch.testing.assert_close(
                gradients[:-1], expected[1][:-1].float(), atol=3e-6 * size, rtol=1e-5
            )


@pytest.mark.parametrize("rank", [8, 16, 32])
def test_kernel_with_the_product_agrees_with_torch(kernel: SplineKernel, rank: int) -> None:
    if not kernel.rows:
        pytest.skip("this processor, or this build, has no products of bf16")
    for rows, out in ((1, 32), (4, 64), (7, 96), (128, 32), (300, 192)):
        for given in (bent(), bent(12, gated=True), bent(4, clamp=True)):
            h, b = torch.randn(rows, rank).bfloat16() / rank**0.5, torch.randn(out, rank).bfloat16()
            gy = torch.randn(rows, out).bfloat16()
            assert kernel.takes_product(h, b)
            z = h.float() @ b.float().t()
            wanted = spline_curve.forward(z, given.curve())
            found = kernel.product_forward(h, b, given)
            torch.testing.assert_close(found.float(), wanted, atol=1e-4, rtol=2**-7)
            expected = spline_curve.backward(z.double(), gy.double(), double(given))
            gz, gradients = kernel.product_backward(h, b, gy, given)
            # At a knot the slope jumps: there fp32's last bit may choose the other side.
            assert ((gz - expected[0]).abs() > 2**-7 * expected[0].abs() + 1e-5).sum() <= 2
            size = float(gy.float().abs().sum()) + 1
            torch.testing.assert_close(
                gradients[:-1], expected[1][:-1].float(), atol=3e-6 * size, rtol=1e-5
            )


def double(given: Parameters) -> Curve:
    return Curve(*(v.double() if isinstance(v, Tensor) else v for v in given.curve()))  # type: ignore[arg-type]


def test_result_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = native.kernel()
    if kernel is None:
        pytest.skip("no C++ compiler")
    given, count = bent(), 16384 * 21 + 77
    z, gy = torch.randn(count), torch.randn(count)
    outcomes: list[tuple[Tensor, ...]] = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outcomes.append((kernel.forward(z.clone(), given), *kernel.backward(z.clone(), gy, given)))
        if kernel.rows:
            h, b = z[: 2051 * 16].view(-1, 16).bfloat16(), gy[: 160 * 16].view(-1, 16).bfloat16()
            g = gy[: 2051 * 160].view(-1, 160).bfloat16()
            outcomes[-1] += (
                kernel.product_forward(h, b, given),
                *kernel.product_backward(h, b, g, given),
            )
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_too_many_pieces_and_other_types_go_to_torch() -> None:
    kernel = native.kernel()
    if kernel is None:
        pytest.skip("no C++ compiler")
    z = torch.randn(8)
    assert kernel.takes(z, bent(65))
    assert not kernel.takes(z, bent(66))
    assert not kernel.takes(z, bent(64, clamp=True))
    assert not kernel.takes(z.half(), bent())
    assert not kernel.takes(z.double(), bent())
