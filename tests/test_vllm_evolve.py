"""A search whose members vLLM serves, against the same search through the batched engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loralab.config import EvolveConfig, parse
from loralab.errors import UserError
from loralab.evolution.events import Notice
from loralab.evolution.opening_vllm import open_vllm
from loralab.evolution.trainer import Result, evolve
from loralab.evolution.workbench import open_batched
from loralab.run import Run
from vllm_tiny import save_tiny

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

GUARDED = True
"""Guards look here as they do in a run of a user's."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny(path)
    return path


def config_for(folder: Path, engine: str = "vllm", **more: Any) -> EvolveConfig:
    own: dict[str, Any] = {"vllm": {"max_loras": 3, "context": 96}, "memory_gb": 0.1}
    values = {
        "kind": "evolve",
        "name": "tiny",
        "model": str(folder),
        "dtype": "float32",
        "threads": 1,
        "task": {"name": "conciseness"},
        "adapter": {"rank": 4, "alpha": 8.0, **more.pop("adapter", {})},
        "engine": {"name": engine, **(own if engine == "vllm" else {"backend": "torch"})},
        "evolution": {
            "generations": 3,
            "population": 6,
            "eval_every": 2,
            "scale": {"fraction": 0.3},
            **more.pop("evolution", {}),
        },
        "generation": {"max_new_tokens": 12},
        "guard": {"prompts": ["ab cd", "ha"]},
        **more,
    }
    return parse(values, "test")


def run_config(path: Path, config: EvolveConfig, resume: bool = False) -> tuple[Result, Run]:
    values = config.to_dict()
    opener = open_vllm if config.engine.name == "vllm" else open_batched
    with Run.resume(path, values) if resume else Run.create(path, values) as run:
        return evolve(config, run, open_workbench=opener), run


def test_a_search_ends_in_the_bits_of_the_batched_engines_and_so_does_a_resumed_one(
    folder: Path, tmp_path: Path
) -> None:
    config = config_for(folder)
    whole, run = run_config(tmp_path / "whole", config)
    assert whole.complete
    rows = run.metrics()[:3]
    assert len({row["reward_mean"] for row in rows}) > 1
    assert all(row["failed"] == 0 for row in rows)
    expected, _ = run_config(tmp_path / "batched", config_for(folder, "batched"))
    assert whole.digest == expected.digest
    assert (whole.start, whole.best, whole.final) == (expected.start, expected.best, expected.final)

    journal = run.journal_path.read_bytes()
    lines = journal.splitlines(True)
    run.journal_path.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    resumed, again = run_config(tmp_path / "whole", config, resume=True)
    assert resumed.digest == whole.digest
    assert again.journal_path.read_bytes() == journal


def test_a_guard_looks_at_texts(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, evolution={"generations": 1})
    with Run.create(tmp_path / "run", config.to_dict()) as run:
        notices = list[str]()
        evolve(
            config,
            run,
            lambda event: notices.append(event.text) if isinstance(event, Notice) else None,
            open_workbench=open_vllm,
        )
    assert not [text for text in notices if "alone:" in text], notices
    assert [text for text in notices if "the divergence from the base is not" in text]
    readings = (run.path / "readings.jsonl").read_text()
    assert '"text.length"' in readings


def test_what_moves_base_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="noise_on: weights"):
        open_vllm(config_for(folder, evolution={"noise_on": "weights"}))
    config = config_for(folder, adapter={"init": "pissa"})
    with pytest.raises(UserError, match="engine vllm cannot move base weights"):
        run_config(tmp_path / "pissa", config)
