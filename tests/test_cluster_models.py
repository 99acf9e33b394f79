"""A cluster with real engines over a tiny model: bits, looks, and a reward that hangs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from local_crew import LocalCrew
from loralab.config import EvolveConfig, parse_evolve
from loralab.evolution.cluster import opening
from loralab.evolution.cluster.messages import pack, unpack
from loralab.evolution.cluster.worker import Worker
from loralab.evolution.journal import read
from loralab.evolution.trainer import evolve
from loralab.evolution.workbench import open_batched
from loralab.run import Run

GUARDED = True


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny.model("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def config_for(model_dir: Path, cluster: dict[str, Any] | None, **changes: Any) -> EvolveConfig:
    values: dict[str, Any] = {
        "kind": "evolve",
        "name": "tiny",
        "model": str(model_dir),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "task": {"name": "conciseness"},
        "adapter": {"rank": 4, "alpha": 8.0},
        "evolution": {
            "generations": 3,
            "population": 6,
            "noise_on": "AB",
            "eval_every": 2,
            "scale": {"fraction": 0.3},
        },
        "generation": {"max_new_tokens": 12},
        "cluster": cluster,
    }
    return parse_evolve(values | changes, "test")


def search(path: Path, config: EvolveConfig, monkeypatch: pytest.MonkeyPatch, **crew: Any) -> Run:
    monkeypatch.setattr(opening, "RayCrew", lambda *given: LocalCrew(*given, **crew))
    with Run.create(path, config.to_dict()) as run:
        assert evolve(config, run, open_workbench=open_batched).complete
    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_units_give_the_same_bits_whoever_runs_them(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    def run(name: str, cluster: dict[str, Any] | None, **crew: Any) -> Run:
        config = config_for(model_dir, cluster, dtype=dtype)
        return search(tmp_path / name, config, monkeypatch, **crew)

    alone = run("alone", {"actors": 1})
    lost = run("lost", {"actors": 3, "restarts": 99}, losses=0.2, seed=3)
    assert read(alone.journal_path).entries == read(lost.journal_path).entries
    for name in ("adapter", "checkpoints/final"):
        for file in (alone.path / name).iterdir():
            assert (lost.path / name / file.name).read_bytes() == file.read_bytes()
    assert len({row["reward_mean"] for row in alone.metrics()[:3]}) > 1
    # Not promised, as kernels may sum a larger batch in another order; it holds for these.
    local = run("local", None)
    assert read(local.journal_path).entries == read(alone.journal_path).entries
    # What the guard sees on an actor is what it sees here.
    looks = [[r["values"] for r in one.readings()] for one in (alone, local)]
    assert looks[0] == looks[1]
    assert {"kl", "es.member_kl", "text.repetition4"} <= set(looks[0][0])
    assert looks[0][-1]["kl"] > 0


HANGING = """
import time
from loralab.tasks.conciseness import Conciseness

class Hanging(Conciseness):
    name = "hanging"

    def score(self, example, completion):
        if completion:
            time.sleep(3600)
        return super().score(example, completion)
"""


def test_a_reward_that_hangs_costs_its_own_completions_alone(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hanging_task.py").write_text(HANGING)
    metadata = tmp_path / "hanging_task-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging_task\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[loralab.tasks]\nhanging = hanging_task:Hanging\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    from loralab import registry

    monkeypatch.delitem(registry.TASKS.__dict__, "_entry_points", raising=False)
    config = config_for(
        model_dir, {"actors": 1}, task={"name": "hanging"}, scoring={"deadline": 1.0}
    )
    worker = Worker(config.to_dict(), open_batched)
    assert "error" not in unpack(worker.do(pack({"kind": "open"})))
    batch = worker._examples.held_out
    made = worker._bench.engine.generate(batch.requests(None)[:2])
    judged = batch.__class__(**{**batch.__dict__, "examples": batch.examples[:2]}).judge(made)
    assert [one.failed for one in judged] == ["task hanging: took longer than 1 s"] * 2
    assert torch.tensor([one.score.reward for one in judged]).isfinite().all()
