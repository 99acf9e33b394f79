"""From a config to a run directory: what an error before the end leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loralab import pipeline
from loralab.config import parse
from loralab.errors import UserError
from loralab.interrupt import Ended
from loralab.run import Run

LEFT: list[str] = []


def train(config: Any, run: Run, on_event: Any, stopping: Any) -> Ended:
    """Stands for a kind's own: leaves some files and fails, the first time."""
    run.note(rows=3)
    (run.path / "checkpoints").mkdir(exist_ok=True)
    if (run.path / "late.jsonl").exists() or not LEFT:
        return Ended(True)
    for name in LEFT:
        run.write(name, "{}\n")
    raise UserError("no row has a label")


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (["timings.json"], False),
        (["start/adapter/a.safetensors"], False),
        (["late.jsonl"], True),
        (["completions/x/late.jsonl", "late.jsonl"], True),
        (["metrics.jsonl"], True),
    ],
)
def test_a_run_that_made_nothing_is_taken_away_and_any_other_is_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: list[str], kept: bool
) -> None:
    monkeypatch.setattr(f"{__name__}.LEFT", left)
    monkeypatch.setitem(pipeline.TRAINERS, "eval", (f"{__name__}:train", "measurement"))  # type: ignore[arg-type]
    monkeypatch.setattr(pipeline, "build_report", lambda path: path)
    config = parse(
        {
            "kind": "eval",
            "name": "x",
            "models": {"a": {}},
            "measures": {"t": {"task": {"name": "t"}}},
        },
        "test",
    )
    for number, existing in enumerate((False, True)):
        path = tmp_path / f"run-{number}"
        if existing:
            path.mkdir()
        with pytest.raises(UserError, match="no row has a label"):
            pipeline.start(config, path, lambda _: None)
        if not kept:
            assert path.exists() == existing
            assert not existing or not list(path.iterdir())
            continue
        assert all((path / name).exists() for name in ("config.yaml", "environment.json", *left))
        if "late.jsonl" in left:
            _, result = pipeline.resume(path, config, lambda _: None)
            assert result.complete
