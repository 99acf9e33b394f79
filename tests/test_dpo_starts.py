"""DPO's first loss is ln 2 with every initialisation, against the reference that fits it."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from loralab.adapters import initialize
from loralab.adapters.attach import attach
from loralab.config import AdapterConfig, TrainingConfig
from loralab.config.dpo import PreferenceConfig
from loralab.gradient.dpo import reference_of, train_pairs
from loralab.models.load import load
from loralab.registry import INITS
from test_dpo import some_pairs

QUANTISED = ("loftq", "quantization_match")
MOVED = ("random", "tiny", "orthogonal_negative", "output_match", "svd_delta", "warm_start")
"""Starts that are not the base: against it the first loss is another number, or nearly ln 2."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of widths that bitsandbytes' CPU kernels take."""
    path = tmp_path_factory.mktemp("starts")
    tiny.save_quantisable(path)
    return path


def started(init: str, folder: Path) -> Any:
    options: dict[str, Any] = {}
    base, _ = load(folder, "float32", quantization="nf4" if init in QUANTISED else None)
    if init in (*QUANTISED, "svd_delta"):
        options["reference"] = load(folder, "float32")[0]
    if init == "warm_start":
        tiny.adapter(base, 1, rank=4, scaling=2.0).save(folder / "adapter")
        options["path"] = str(folder / "adapter")
    if init == "svd_delta":
        generator = torch.Generator().manual_seed(3)
        for parameter in options["reference"].parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    model = attach(base, AdapterConfig(rank=4, alpha=8.0), 0)
    texts = [tiny.words(12, i) for i in range(8)]
    initialize(model, init, tokenizer=tiny.tokenizer(), texts=texts, seed=0, **options)
    return model


def losses(model: Any, kind: Any) -> tuple[float, ...]:
    settings = TrainingConfig(steps=2, batch_size=4, lr=1e-2)
    told = PreferenceConfig(beta=1.0)
    reference = reference_of(model, kind)
    return train_pairs(
        model, tiny.tokenizer(), some_pairs(), settings, told, 0, reference=reference
    ).losses


@pytest.mark.parametrize("init", INITS.names())
def test_the_first_loss_is_ln_2_with_every_start(init: str, folder: Path) -> None:
    if init in QUANTISED:
        pytest.importorskip("bitsandbytes")
    first, second = losses(started(init, folder), "start")
    assert first == pytest.approx(log(2), abs=1e-6)
    if init != "progressive":  # whose strength at the second step is still small
        assert abs(second - log(2)) > 1e-4
    first, _ = losses(started(init, folder), "base")
    if init in (*MOVED, *QUANTISED):
        assert abs(first - log(2)) > 1e-5
    else:
        assert first == pytest.approx(log(2), abs=1e-4)
