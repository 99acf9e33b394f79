"""A run whose adapter's scaling rises from 0: step by step, after a stop, and as it is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from loralab import pipeline
from loralab.adapters.attach import attach
from loralab.adapters.inits import initialize
from loralab.config import AdapterConfig, TrainingConfig
from loralab.gradient.events import StepDone
from loralab.gradient.sft import train
from loralab.run import Run
from starts import texts
from test_sft import adapter_of, config_for, run_it, same_tensors, some_rows, without_times
from test_sft import folder as folder

RISING = {"init": {"name": "progressive", "options": {"steps": 4}}, "dropout": 0.0}


def alpha_of(run: Run) -> float:
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    return float(config["lora_alpha"])


def shares(run: Run) -> list[tuple[int, float]]:
    newest = max(run.checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row["adapter_share"]) for row in history if "adapter_share" in row]


def test_the_share_rises_and_goes_on_after_a_stop(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, adapter=RISING)
    seen: list[float] = []

    def note(event: Any) -> None:
        if isinstance(event, StepDone):
            seen.append(event.loss)

    run, result = pipeline.start(config, tmp_path / "whole", note)
    assert result.complete
    assert shares(Run.open(tmp_path / "whole"))[:5] == [
        (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0),
    ]  # fmt: skip
    assert alpha_of(run) == 8.0

    first, cut = run_it(tmp_path / "cut", config, stop_at=2)
    assert first.steps == 2
    # Saved with the strength it was trained with; the run itself goes on to the whole.
    assert alpha_of(cut) == 4.0
    last, cut = run_it(tmp_path / "cut", config)
    assert list(last.losses) == seen
    assert alpha_of(cut) == 8.0
    assert same_tensors(adapter_of(cut), adapter_of(run))
    assert without_times(cut) == without_times(Run.open(tmp_path / "whole"))


def rising(**options: Any) -> Any:
    model = attach(tiny.model("llama"), AdapterConfig(rank=4, alpha=8.0), 0)
    initialize(
        model,
        "progressive",
        tokenizer=tiny.tokenizer(),
        texts=texts(),
        start="random",
        **options,
    )
    return model


@pytest.mark.parametrize("shape", ["linear", "adaptive"])
def test_the_fast_step_rises_as_the_stock_step_does(shape: str) -> None:
    settings = TrainingConfig(steps=5, batch_size=3, lr=1e-2)
    options = {"steps": 3, "shape": shape, "kl_budget": 0.5}
    ours, stock = (
        train(
            rising(**options),
            tiny.tokenizer(),
            some_rows(),
            settings.model_copy(update={"fast": fast}),
            seed=4,
        )
        for fast in (True, False)
    )
    assert ours.losses == pytest.approx(stock.losses, abs=3e-4)
    # At share 0 nothing can be learned but the rise itself shows in the next step.
    assert len(set(ours.losses)) == 5


def test_a_base_at_step_0_and_its_full_strength_at_the_end() -> None:
    model = rising(steps=3)
    ids = torch.tensor([[4, 9, 21, 33, 50, 8]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, tiny.model("llama")(input_ids=ids).logits)
    settings = TrainingConfig(steps=4, batch_size=3, lr=1e-2)
    train(model, tiny.tokenizer(), some_rows(), settings, seed=4)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 2.0
