"""Pages of evaluations and distillations, and what is not there yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loralab.config import parse
from loralab.report import build_report
from loralab.run import Run

EVAL = {
    "kind": "eval",
    "models": {"base": {}, "<b>tuned": {"adapter": "x"}},
    "measures": {"text": {"task": {"name": "text"}}, "sst2": {"task": {"name": "sst2"}}},
}
DISTILL = {"kind": "distill", "model": "m", "task": {"name": "gsm8k"}}
ABLATION = {
    "kind": "ablation",
    "model": "m",
    "run": {"task": {"name": "gsm8k"}, "training": {"steps": 1}},
    "variants": [{"name": "one", "says": "as it is"}],
}


def begun(path: Path, values: dict[str, Any], *rows: dict[str, Any]) -> Path:
    with Run.create(path, parse({"name": "x", **values}, "test").to_dict()) as run:
        for row in rows:
            run.log_metrics(row)
    return path


@pytest.mark.parametrize("values", [EVAL, DISTILL, ABLATION])
def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path, values: dict[str, Any]) -> None:
    page = build_report(begun(tmp_path / "run", values)).read_text()
    assert "generation has finished" not in page
    assert f"kind: {values['kind']}" in page


def test_an_evaluation_shows_models_by_measures(tmp_path: Path) -> None:
    common = {"model": "base", "parameters": 1_790_000}
    path = begun(
        tmp_path / "run",
        EVAL,
        {**common, "measure": "text", "perplexity": 91.94, "tokens": 5},
        {**common, "measure": "sst2", "reward": 0.5, "correct": 0.645, "metrics": {"f1": 0.25}},
        {"model": "<b>tuned", "parameters": 12, "measure": "sst2", "reward": 0.25, "correct": None},
    )
    page = build_report(path).read_text()
    assert "<td>base</td><td>1.79 M</td><td>91.94</td><td>64 %, F1 0.25</td>" in page
    assert "<td>&lt;b&gt;tuned</td><td>12</td><td>–</td><td>reward 0.25</td>" in page
    assert "Unfinished: 1 measurements are missing." in page


def test_a_distillation_shows_what_was_kept(tmp_path: Path) -> None:
    row = {"step": 1, "completions": 240, "kept": 7, "solved": 5, "cut": 1, "failed": 0}
    page = build_report(begun(tmp_path / "run", DISTILL, row)).read_text()
    assert "<td>1</td><td>240</td><td>7</td><td>5</td><td>1</td><td>0</td>" in page
