"""Runs with an LS-LoRA adapter write down what its splines do, and the report shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from loralab import pipeline
from loralab.adapters.spline_diagnostics import spline_diagnostics
from loralab.config import parse
from loralab.gradient.events import Remark, TrainingEvent
from loralab.gradient.fine_tune import fine_tune
from loralab.models.load import load
from loralab.report import build_report
from loralab.run import Run
from test_sft import config_for, run_it, without_times
from test_sft import folder as folder

LSLORA = {"type": "lslora", "type_options": {"k_min": -0.01, "k_max": 0.01}}
"""A grid so narrow that some inputs miss it as soon as B has moved."""


def test_a_run_journals_its_splines_and_the_report_shows_them(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, adapter=LSLORA, training={"steps": 13, "lr": 2e-2})
    _, run = run_it(tmp_path / "run", config)
    rows = [row for row in run.metrics() if "loss" in row]
    assert all("spline_deviation" in row and "spline_slope_variance" in row for row in rows)
    assert [row["step"] for row in rows if "spline_outside" in row] == [1, 10, 13]
    assert rows[0]["spline_outside"] == 0, "B is 0"
    assert 0 < rows[-1]["spline_outside"] <= rows[-1]["spline_outside_max"] <= 1
    assert 0 < rows[0]["spline_deviation"] < rows[-1]["spline_deviation"]
    assert rows[-1]["spline_input_scale"] != 1

    layers = json.loads((run.path / "splines.json").read_text())
    model, _ = load(config.model, "float32")
    trained = spline_diagnostics(PeftModel.from_pretrained(model, run.adapter))
    assert layers.keys() == trained.keys()
    for name, numbers in trained.items():
        assert layers[name] == pytest.approx({**numbers, "outside": layers[name]["outside"]})

    page = build_report(run.path).read_text()
    for part in ("0 is plain LoRA", "Share of what the step put in", "Mean over the layers"):
        assert part in page
    names = {file.stem for file in (run.path / "figures").iterdir()}
    assert names >= {"spline_deviation", "spline_outside", "spline_slope_variance", "spline_scales"}


def test_a_resumed_run_tells_the_same_of_its_splines(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, adapter=LSLORA, training={"steps": 12, "lr": 2e-2})
    _, whole = run_it(tmp_path / "whole", config)
    run_it(tmp_path / "cut", config, stop_at=6)
    _, cut = run_it(tmp_path / "cut", config)
    assert without_times(cut) == without_times(whole)
    layers = [json.loads((run.path / "splines.json").read_text()) for run in (whole, cut)]
    assert layers[0] == layers[1]


def test_plain_lora_has_no_splines_to_tell_of(folder: Path, tmp_path: Path) -> None:
    _, run = run_it(tmp_path / "run", config_for(folder, training={"steps": 2}))
    assert not any(key.startswith("spline") for row in run.metrics() for key in row)
    assert not (run.path / "splines.json").exists()


def test_weight_decay_on_splines_is_remarked_on(folder: Path, tmp_path: Path) -> None:
    training = {"steps": 1, "weight_decay": 0.1}
    config: Any = config_for(folder, adapter=LSLORA, training=training)
    said: list[TrainingEvent] = []
    with Run.create(tmp_path / "run", config.to_dict()) as run:
        fine_tune(config, run, said.append)
    assert any(isinstance(e, Remark) and "weight_decay is 0.1" in str(e) for e in said)


def test_a_run_of_another_kind_journals_them_too(folder: Path, tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"aa b{c}", "chosen": f" c{c} dd", "rejected": f" d{c} cc"} for c in "abcdefgh"
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = parse(
        {
            "kind": "dpo", "name": "tiny", "model": str(folder / "model"), "dtype": "float32",
            "device": "cpu", "threads": 1,
            "data": {"path": str(folder / "pairs.jsonl"), "test_share": 0.25},
            "adapter": {"rank": 4, "alpha": 8.0, **LSLORA},
            "training": {"steps": 3, "batch_size": 2, "max_length": 32},
            "generation": {"max_new_tokens": 4},
        },
        "test",
    )  # fmt: skip
    run, _ = pipeline.start(config, tmp_path / "run", lambda _: None)
    rows = [row for row in run.metrics() if "loss" in row]
    assert [row["step"] for row in rows if "spline_outside" in row] == [1, 3]
