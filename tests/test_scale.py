"""Weight analysis and the size of noise: against NumPy in float64, and what one outlier may do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loralab.adapters.scale import analyse, kind_of, layer_of, sigma_a, sigma_b
from loralab.errors import UserError

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def weights(dtype: torch.dtype, layers: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Modules of mean |W| about 0.007, of uneven sizes."""
    g = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{i}.{kind}": (
            torch.randn(30 + 7 * k, 24 + i, generator=g) * 0.007 * np.sqrt(np.pi / 2)
        ).to(dtype)
        for i in range(layers)
        for k, kind in enumerate(KINDS)
    }


def reference(tensors: list[torch.Tensor]) -> tuple[float, float, float, float, int]:
    w = np.abs(np.concatenate([t.double().numpy().reshape(-1) for t in tensors]))
    return w.mean(), np.median(w), np.sqrt((w**2).mean()), w.max(), w.size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_magnitudes_are_numpy_s(dtype: torch.dtype) -> None:
    w = weights(dtype)
    report = analyse(w)
    for name, tensor in w.items():
        m = report.modules[name]
        expected = reference([tensor])
        assert (m.mean, m.median, m.rms, m.max, m.count) == pytest.approx(expected, rel=1e-6)
    for layer, m in report.layers.items():
        expected = reference([t for n, t in w.items() if layer_of(n) == layer])
        assert (m.mean, m.median, m.rms, m.max, m.count) == pytest.approx(expected, rel=1e-6)
    assert list(report.layers) == [f"model.layers.{i}" for i in range(3)]
    assert not report.outliers


def test_a_transposed_view_counts_as_its_own_entries() -> None:
    w = torch.randn(16, 24).bfloat16()
    assert analyse({"a.b": w.t()}).modules == analyse({"a.b": w}).modules


def test_names_split_into_layer_and_kind() -> None:
    assert layer_of("model.layers.12.mlp.up_proj") == "model.layers.12"
    assert kind_of("model.layers.12.mlp.up_proj") == "mlp.up_proj"
    assert layer_of("transformer.h.0.attn.c_attn") == "transformer.h.0"
    assert (layer_of("score"), kind_of("score")) == ("", "score")


def test_one_outlier_sets_a_layer_s_noise_only_in_the_old_way() -> None:
    """An o_proj of 8.5 among modules of 0.007: the rest must keep noise of their own size."""
    w = weights(torch.bfloat16)
    loud = "model.layers.1.self_attn.o_proj"
    w[loud] = (w[loud].float() / 0.007 * 8.5).bfloat16()
    report = analyse(w)

    assert [o.module for o in report.outliers] == [loud]
    assert report.outliers[0].ratio == pytest.approx(8.5 / 0.007, rel=0.2)
    assert loud in str(report.outliers[0])

    quiet = "model.layers.1.mlp.up_proj"
    old = report.perturbation("layer", "mean", 0.1)
    assert old[quiet] == old[loud] > 0.15  # over 20 x the weights it is added to
    default = report.perturbation("module", "mean", 0.1)
    assert default[quiet] == pytest.approx(0.0007, rel=0.1)
    assert default[loud] == pytest.approx(0.85, rel=0.1)
    for name in w:
        if not name.startswith("model.layers.1"):
            assert default[name] == pytest.approx(0.0007, rel=0.1)


def test_a_loud_layer_is_found_by_its_kind() -> None:
    w = weights(torch.float32)
    for name in w:
        if name.startswith("model.layers.2"):
            w[name] = w[name] * 20
    assert {o.module for o in analyse(w).outliers} == {n for n in w if ".2." in n}
    assert {o.among for o in analyse(w).outliers} == {"kind"}


@pytest.mark.parametrize("scaling", [0.5, 1.0, 4.0])
def test_noise_on_b_changes_w_by_what_was_wanted(scaling: float) -> None:
    g = torch.Generator().manual_seed(1)
    a = torch.randn(8, 300, generator=g, dtype=torch.float64) * torch.rand(8, 1, generator=g) * 3
    sigma = sigma_b(0.02, a, scaling)
    changes = [
        scaling * (torch.randn(200, 8, generator=g, dtype=torch.float64) * sigma) @ a
        for _ in range(50)
    ]
    rms = torch.stack(changes).square().mean().sqrt()
    assert float(rms) == pytest.approx(0.02, rel=0.02)


def test_noise_on_a_is_a_fraction_of_a() -> None:
    a = torch.randn(8, 300)
    assert sigma_a(a, "rms", 0.1) == pytest.approx(0.1 * float(a.square().mean().sqrt()))
    assert sigma_a(a * 5, "median", 0.2) == pytest.approx(float(a.abs().median()), rel=0.01)


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(UserError, match=r"layers.0.q: the weight holds NaN"):
        analyse({"layers.0.q": torch.tensor([[1.0, float("nan")]])})
    with pytest.raises(UserError, match="infinity"):
        analyse({"layers.0.q": torch.tensor([[1.0, float("inf")]]).bfloat16()})
    sparse = torch.zeros(4, 4)
    sparse[0, 0] = 1
    report = analyse({"layers.0.q": sparse})
    with pytest.raises(UserError, match=r"median of \|W\| by module is 0"):
        report.perturbation("module", "median", 0.1)
    with pytest.raises(ValueError, match="cannot change W"):
        sigma_b(0.1, torch.zeros(2, 3), 1.0)
