"""A stage on a quantised base: its adapter is measured on that base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from loralab import pipeline
from loralab.config import parse
from loralab.config.references import references
from loralab.engines.likelihood import likelihood
from loralab.run import Run
from loralab.stages.outputs import Left
from loralab.stages.runner import _resolved
from loralab.subject import subject_of

pytest.importorskip("bitsandbytes")


def test_a_stages_adapter_is_measured_on_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    tiny.save_quantisable(tmp_path / "model", noise=0.3)
    rows = [{"prompt": tiny.words(3, i), "completion": tiny.words(2, i)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = tiny.words(60, 3)
    (tmp_path / "test.txt").write_text(text)
    sft = {
        "kind": "sft",
        "quantization": "nf4",
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "training": {"steps": 2, "batch_size": 2, "lr": 1e-2, "max_length": 32},
        "evaluation": {"limit": 1},
        "generation": {"max_new_tokens": 2},
        "guard": None,
    }
    measures = {"text": {"task": {"name": "text", "options": {"path": str(tmp_path / "test.txt")}}}}
    models: dict[str, Any] = {"tuned": {"adapter": "stages.sft.adapter"}, "dense": {}}
    values = {
        "kind": "pipeline",
        "name": "q",
        "model": str(tmp_path / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "stages": {"sft": sft, "eval": {"kind": "eval", "models": models, "measures": measures}},
    }
    run, result = pipeline.start(parse(values, "test"), tmp_path / "run", lambda _: None)
    assert result.complete
    config = Run.open(run.path / "eval").config
    assert [config["models"][name]["quantization"] for name in models] == ["nf4", None]
    tuned, dense = Run.open(run.path / "eval").metrics()
    opened = subject_of(str(run.path / "sft"), device="cpu").open()
    wanted = likelihood(opened.model, opened.tokenizer, text, opened.state).to_dict()
    assert tuned["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-6)
    assert tuned["parameters"] > dense["parameters"]


def test_a_teacher_answers_on_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    sft = {
        "kind": "sft",
        "quantization": "nf4",
        "data": {"path": "rows.jsonl"},
        "training": {"steps": 1},
    }
    teach = {
        "kind": "distill", "adapter": "stages.sft.adapter", "task": {"name": "conciseness"}
    }  # fmt: skip
    values = {"kind": "pipeline", "name": "q", "model": "m", "stages": {"sft": sft, "t": teach}}
    stages = parse(values, "test").parsed()
    wanted = references(stages["t"].to_dict(), "t")
    (tmp_path / "adapter").mkdir()
    left = {"sft": Left("sft", stages["sft"], tmp_path)}
    resolved: Any = _resolved(stages["t"], wanted, left, lambda _: None)
    assert resolved.quantization == "nf4"
