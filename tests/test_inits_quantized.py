"""Starts on nf4 and int8 bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from loralab.adapters.dense import dense_weight
from loralab.adapters.inits.quantize import fake_quantize
from loralab.adapters.targets import linear_weights
from loralab.errors import UserError
from loralab.models.load import load
from loralab.registry import INITS
from starts import (
    EVERY_TYPE,
    logits,
    start,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, of widths that bitsandbytes' CPU kernels take."""
    path = tmp_path_factory.mktemp("model")
    tiny.save_quantisable(path)
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


def test_the_dense_weight_is_what_quantisation_left(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    full, _ = load(folder, "float32")
    for bits, number in (("nf4", 4), ("int8", 8)):
        quantised, _ = load(folder, "float32", quantization=bits)  # type: ignore[arg-type]
        for name, weight in linear_weights(full).items():
            step = weight.abs().amax(1, keepdim=True) / 127
            found = dense_weight(quantised.get_submodule(name))
            wanted = fake_quantize(weight, number)
            if bits == "int8":  # from float16, which rounds some to the next step
                assert ((found - weight).abs() / step).max() < 0.6
                assert ((found - wanted).abs() / step).mean() < 0.05
            else:
                torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)
