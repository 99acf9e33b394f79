"""Adapters of the small language, sound and spoilt, for the tests of the doctor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loralab
import small_language as language
from loralab.health.doctor import Report

WEIGHTS = "adapter_model.safetensors"


def base_in(factory: pytest.TempPathFactory) -> Path:
    """A model that speaks the small language, made once for all tests of a process."""
    folder = factory.getbasetemp() / "small-language"
    return folder if folder.exists() else language.make_base(folder)


def tokenizer_of(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def saved(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def examined(adapter: Path, base: Path | None = None, **options: Any) -> Report:
    report = loralab.doctor(
        adapter,
        None if base is None else str(base),
        prompts=language.prompts(),
        dtype="float32",
        max_new_tokens=24,
        **options,
    )
    assert isinstance(report, Report)
    return report


def rewrite_config(directory: Path, **fields: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def random_factors(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and ("q_proj" in name or "v_proj" in name):
                parameter.copy_(10 * 0.3 * torch.randn(parameter.shape, generator=generator))


def keys_dropped(base: Path, directory: Path) -> Path:
    saved(language.adapted(base), directory)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    rewrite_tensors(directory, drop)
    return directory
