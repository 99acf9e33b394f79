"""The doctor on real weights: ten adapters that stock PEFT made on SmolLM2.

pytest -s -m slow tests/test_doctor_smollm2.py       prints the table of docs/doctor.md
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import loralab
from doctor_cases import random_factors, rewrite_config, rewrite_tensors
from loralab.health.prompts import shipped_prompts

STEPS = 6
WANTED: dict[str, tuple[str, ...]] = {
    "lora": (),
    "every linear": (),
    "rslora": (),
    "dora": (),
    "pissa": (),
    "both random x 10": ("init.garbled", "lr.too_high", "scale.wrong"),
    "never started": ("init.garbled", "lr.too_high", "scale.wrong"),
    "alpha x 2000": ("scale.wrong", "lr.too_high"),
    "nan": ("numbers.nan",),
    "ten keys dropped": ("save.keys_dropped",),
}
"""Causes of which one has to be among the first two; none of a sound adapter."""


def trained(model: Any, tokenizer: Any) -> None:
    texts = [f"{one.shown}\n{one.good}{tokenizer.eos_token}" for one in shipped_prompts()[12:28]]
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=2e-4)
    model.train()
    for step in range(STEPS):
        batch = tokenizer(texts[step % len(texts)], return_tensors="pt")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def made(directory: Path, change: Callable[[Any, Any], None] = trained, **options: Any) -> Path:
    """A saved adapter, on a base of its own: some starts change it."""
    torch.manual_seed(0)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **options}
    base, tokenizer = loralab.load("smollm2")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    change(model, tokenizer)
    model.save_pretrained(directory)
    rewrite_config(directory, base_model_name_or_path="smollm2")
    return directory


def untouched(model: Any, tokenizer: Any) -> None:
    pass


def scaled(directory: Path) -> Path:
    rewrite_config(made(directory), lora_alpha=16 * 2000)
    return directory


def with_nan(directory: Path) -> Path:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors)].fill_(float("nan"))

    rewrite_tensors(made(directory), spoil)
    return directory


def without_keys(directory: Path) -> Path:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in sorted(tensors)[:10]:
            del tensors[name]

    rewrite_tensors(made(directory), drop)
    return directory


MAKERS: dict[str, Callable[[Path], Path]] = {
    "lora": made,
    "every linear": lambda d: made(d, target_modules="all-linear"),
    "rslora": lambda d: made(d, use_rslora=True, r=16),
    "dora": lambda d: made(d, use_dora=True, r=4),
    "pissa": lambda d: made(d, init_lora_weights="pissa"),
    "both random x 10": lambda d: made(d, lambda model, _: random_factors(model)),
    "never started": lambda d: made(d, untouched, init_lora_weights=False, lora_alpha=256),
    "alpha x 2000": scaled,
    "nan": with_nan,
    "ten keys dropped": without_keys,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WANTED)
def test_ten_adapters_of_smollm2(kind: str, tmp_path: Path) -> None:
    """Five sound and five broken ones."""
    directory = MAKERS[kind](tmp_path / "adapter")
    clock, processor = time.perf_counter(), time.process_time()
    report = loralab.doctor(directory)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    first = report.causes[0] if report.causes else "-"
    told = f"| {kind} | {report.verdict} | {first} | {processor:.0f} | {clock:.0f} |"
    print(f"\n{told}", flush=True)
    wanted = WANTED[kind]
    assert report.sound == (not wanted), str(report)
    if wanted:
        assert set(wanted) & set(report.causes[:2]), str(report)
