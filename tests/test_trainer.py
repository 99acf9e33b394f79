"""The trainer with an engine that is exact and instant: what it asks, scores and writes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_engine import SHAPES, FakeEngine, make_config, workbench
from loralab import tasks
from loralab.adapters.state import AdapterState
from loralab.config import EvolveConfig
from loralab.engines.base import Completion, Progress, Request
from loralab.errors import UserError
from loralab.evolution.events import Event, Finished, GenerationDone, Notice, Started
from loralab.evolution.journal import read
from loralab.evolution.replay import as_adapter, replay, save_generation
from loralab.evolution.subsets import fixed_subset, window
from loralab.evolution.trainer import Result, evolve
from loralab.run import Run
from loralab.timings import Timings

MODES: list[dict[str, Any]] = [
    {"noise_on": "B"},
    {"noise_on": "AB", "optimizer": {"name": "momentum", "lr": 0.5}},
    {"noise_on": "weights", "noise_rank": 2},
    {"noise_on": "B", "dtype": "bfloat16", "optimizer": {"name": "adam", "lr": 0.3}},
    {"noise_on": "B", "per_prompt_baseline": True, "samples_per_generation": 1},
]


def start(
    path: Path, config: EvolveConfig, engine: FakeEngine | None = None, resume: bool = False
) -> tuple[Result, Run, list[Event]]:
    dtype = getattr(torch, config.dtype)
    values = config.to_dict()
    events: list[Event] = []
    with Run.resume(path, values) if resume else Run.create(path, values) as run:
        result = evolve(config, run, events.append, lambda _: workbench(engine, dtype))
    return result, run, events


def cut_journal(path: Path, generations: int) -> None:
    """Leave a run as a kill after that many generations would."""
    journal = path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(True)
    journal.write_bytes(b"".join(lines[: generations + 1]) + lines[generations + 1][:20])


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values()))[:30])
def test_it_learns_and_a_resumed_run_ends_in_the_same_bits(
    tmp_path: Path, mode: dict[str, Any]
) -> None:
    config = make_config(**mode)
    whole, run, _ = start(tmp_path / "whole", config)
    assert whole.complete
    assert whole.start is not None
    assert whole.best is not None
    assert whole.best.reward > whole.start.reward + 20

    start(tmp_path / "cut", config)
    cut_journal(tmp_path / "cut", 5)
    resumed, again, events = start(tmp_path / "cut", config, resume=True)
    [began] = [event for event in events if isinstance(event, Started)]
    assert began.resumed_at == 5
    assert replace(resumed, adapter=whole.adapter) == whole
    assert again.journal_path.read_bytes() == run.journal_path.read_bytes()
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (again.path / name).read_bytes() == (run.path / name).read_bytes()
    timeless = [
        [
            {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
            for row in rows
        ]
        for rows in (run.metrics(), again.metrics())
    ]
    assert timeless[0] == timeless[1]
    by_key = [
        {(r["generation"], r["phase"], r["example"]): r for r in rows}
        for rows in (run.completions(), again.completions())
    ]
    assert by_key[0] == by_key[1]


def test_shuffled_rewards_do_not_rise(tmp_path: Path) -> None:
    """Members' answers are dealt out at random: the centre must not get better for it."""

    class Shuffling(FakeEngine):
        def generate(
            self, requests: Sequence[Request], progress: Progress | None = None
        ) -> list[Completion]:
            done = super().generate(requests, progress)
            members = [i for i, r in enumerate(requests) if r.adapter and "-m" in r.adapter]
            shuffled = random.Random(len(self.seen)).sample(members, len(members))
            moved = dict(zip(members, shuffled, strict=True))
            return [done[moved.get(i, i)] for i in range(len(done))]

    options = {"generations": 30, "population": 16}
    honest, _, _ = start(tmp_path / "honest", make_config(**options))
    noise, _, _ = start(tmp_path / "noise", make_config(**options), Shuffling())
    assert honest.start is not None
    assert honest.final is not None
    assert noise.final is not None
    assert honest.final.reward - honest.start.reward > 60
    assert noise.final.reward - honest.start.reward < 20


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    config = make_config(generations=9, eval_every=4)
    engine = FakeEngine()
    result, run, events = start(tmp_path / "run", config, engine)
    rows = run.metrics()
    assert [r["generation"] for r in rows] == list(range(10))
    assert [r["generation"] for r in rows if "held_out_reward" in r] == [0, 4, 8, 9]
    assert rows[0]["held_out_reward"] == pytest.approx(
        np.mean([-abs(120 - len(str(e.data["target"]))) for e in held_out_examples()])
    )
    for row in rows[:9]:
        assert row["reward_min"] <= row["reward_mean"] <= row["reward_max"]
        assert row["tokens_per_second"] > 0
        assert row["failed"] == 0
        assert 0 <= row["unchanged_share"] <= 1
        assert row["update_rms"] > 0
    assert result.best_generation == rows[-1]["best_generation"]

    completions = run.completions()
    assert [c["phase"] for c in completions if c["generation"] == 0].count("before") == 8
    after = [c for c in completions if c["phase"] == "after"]
    assert len(after) == 8
    assert {c["generation"] for c in after} == {result.best_generation}
    assert all(c["gold"] for c in after)
    train = [c for c in completions if c["split"] == "train"]
    assert [c["generation"] for c in train] == list(range(9))

    timings = Timings.load(run.timings_path).to_dict()
    assert set(timings) == {
        "weight_analysis", "init_population", "server_launch", "loading", "evaluation",
        "es_update", "create_loras", "unloading", "total_experiment",
    }  # fmt: skip
    done = [e for e in events if isinstance(e, GenerationDone)]
    assert [e.generation for e in done] == list(range(9))
    assert done[-1].time_left == 0
    assert done[0].time_left > 0
    assert set(done[3].best_completion) == {"x"}
    assert events[-1] == Finished(True, 9)
    assert run.environment()["kernel"] == "fake"
    assert engine.adapters == {}

    best = AdapterState.load(run.adapter)
    assert best.digest() == as_adapter(replay(run, result.best_generation), config)[0].digest()
    last = AdapterState.load(run.checkpoints / "final")
    assert last.digest() == result.digest == read(run.journal_path).entries[-1].digest


def held_out_examples() -> list[Any]:
    return list(tasks.get("conciseness").examples("test"))


def test_all_members_and_the_centre_share_one_batch(tmp_path: Path) -> None:
    engine = FakeEngine()
    config = make_config(generations=2, eval_every=2, test_samples=3)
    start(tmp_path / "run", config, engine)
    train = len(tasks.get("conciseness").examples("train"))
    assert [len(requests) for requests in engine.seen] == [8 * train + 3, 8 * train, 3]
    adapters = [r.adapter for r in engine.seen[0]]
    assert adapters == [f"g0-m{i}" for i in range(8) for _ in range(train)] + ["g0-centre"] * 3
    seeds = {(r.adapter, r.sampling.seed) for r in engine.seen[0]}
    of_member = [{s for name, s in seeds if name == f"g0-m{i}"} for i in range(8)]
    assert all(s == of_member[0] and len(s) == train for s in of_member)
    later = {r.sampling.seed for r in engine.seen[1]}
    assert not later & of_member[0]
    held_out = {r.sampling.seed for r in engine.seen[0][-3:]}
    assert held_out == {r.sampling.seed for r in engine.seen[2]}


def test_replay_gives_every_generation(tmp_path: Path) -> None:
    config = make_config(generations=5, seed=11)
    _, run, _ = start(tmp_path / "run", config)
    entries = read(run.journal_path).entries
    assert replay(run, 0).space.digest(replay(run, 0).master) == read(run.journal_path).header.start
    for generation in (1, 3, 5):
        out = tmp_path / f"out{generation}"
        replayed = save_generation(run, generation, out)
        assert replayed.digest == entries[generation - 1].digest
        assert AdapterState.load(out).digest() == replayed.digest
    assert save_generation(run, None, tmp_path / "last").generation == 5
    with pytest.raises(UserError, match="generation is 6; the journal holds 0 to 5"):
        replay(run, 6)
    with pytest.raises(UserError, match="exists and is not empty"):
        save_generation(run, 1, tmp_path / "last")


def test_weights_mode_leaves_a_merged_model_and_the_nearest_adapter(tmp_path: Path) -> None:
    engine = FakeEngine()
    config = make_config(noise_on="weights", generations=6)
    result, run, _ = start(tmp_path / "run", config, engine)
    kept = replay(run, result.best_generation)
    change = kept.space.centre(kept.master).change
    assert change is not None
    adapter = AdapterState.load(run.adapter)
    lost = {
        n: change[n] - adapter.scaling * adapter.factors[n].B @ adapter.factors[n].A for n in SHAPES
    }
    size = sum(float(c.square().sum()) for c in change.values()) ** 0.5
    error = sum(float(d.square().sum()) for d in lost.values()) ** 0.5 / size
    assert result.truncation_error == pytest.approx(error, rel=1e-3)
    assert 0.05 < error < 1
    saved = json.loads((run.adapter / "truncation.json").read_text())
    assert saved["relative_error"] == result.truncation_error
    assert set(saved["modules"]) == set(SHAPES)
    assert saved["held_out_reward"] < 0
    assert (run.path / "merged" / "model.safetensors").exists()
    assert [f["rule"] for f in run.findings()] == ["truncation"]
    out = save_generation(run, result.best_generation, tmp_path / "out")
    assert out.truncation is not None
    assert out.truncation.total == result.truncation_error


@pytest.mark.parametrize(
    ("changes", "kernel", "message"),
    [
        ({"seed": 4}, "fake", "seed was 0, is 4"),
        ({"population": 10}, "fake", "evolution.population was 8, is 10"),
        ({}, "other", "started with kernel 'fake', this engine runs 'other'"),
    ],
)
def test_it_refuses_to_go_on_with_something_else(
    tmp_path: Path, changes: dict[str, Any], kernel: str, message: str
) -> None:
    start(tmp_path / "run", make_config(generations=2))
    config = make_config(**({"generations": 2} | changes))
    with Run.resume(tmp_path / "run") as run, pytest.raises(UserError, match=message):
        evolve(config, run, open_workbench=lambda _: workbench(FakeEngine(kernel)))


def test_the_best_is_kept_even_if_it_came_before_a_kill(tmp_path: Path) -> None:
    class Decaying(FakeEngine):
        """Every adapter from generation 5 on writes far too much."""

        def _answer(self, request: Request, length: int) -> Completion:
            assert request.adapter is not None
            late = int(request.adapter[1:].split("-")[0]) >= 5
            return super()._answer(request, length + 500 * late)

    config = make_config(generations=9, eval_every=2)
    whole, run, _ = start(tmp_path / "whole", config, Decaying())
    assert whole.best_generation == 4
    assert whole.best is not None
    assert whole.final is not None
    assert whole.best.reward > whole.final.reward + 300
    start(tmp_path / "cut", config, Decaying())
    cut_journal(tmp_path / "cut", 6)
    resumed, again, _ = start(tmp_path / "cut", config, Decaying(), resume=True)
    assert replace(resumed, adapter=whole.adapter) == whole
    kept = replay(run, 4)
    for path in (run.adapter, again.adapter):
        assert AdapterState.load(path).digest() == kept.space.digest(kept.master)
    after = [[r for r in x.completions() if r["phase"] == "after"] for x in (run, again)]
    assert after[0] == after[1][-8:]


def test_it_refuses_another_model(tmp_path: Path) -> None:
    config = make_config(generations=2)
    start(tmp_path / "run", config)
    bench = workbench()
    other = {n: w + 1 for n, w in bench.weights.items()}
    with Run.resume(tmp_path / "run") as run, pytest.raises(UserError, match="'fake' is not the"):
        evolve(config, run, open_workbench=lambda _: replace(bench, weights=other))


def test_a_damaged_line_is_said_and_run_again(tmp_path: Path) -> None:
    config = make_config(generations=6)
    whole, run, _ = start(tmp_path / "run", config)
    sound = run.journal_path.read_bytes()
    lines = sound.splitlines(True)
    flipped = bytearray(sound)
    flipped[len(b"".join(lines[:4])) + 60] ^= 4
    run.journal_path.write_bytes(flipped)
    resumed, _, events = start(tmp_path / "run", config, resume=True)
    notices = [e.text for e in events if isinstance(e, Notice)]
    assert any("the 3 generations before it are used" in text for text in notices)
    assert run.findings()[0]["rule"] == "damaged_journal"
    assert resumed == whole
    assert run.journal_path.read_bytes() == sound
    assert [r["generation"] for r in run.metrics()] == list(range(7))


def test_a_wrong_digest_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run, _ = start(tmp_path / "run", make_config(generations=3))
    import loralab.evolution.noise as noise

    real = noise.key
    monkeypatch.setattr(noise, "key", lambda *a: real(*a) + (a[1] == 1))
    assert replay(run, 1)
    with pytest.raises(
        UserError, match=r"generation 2 rebuilt .* was written with loralab .*torch"
    ):
        replay(run)


def test_what_cannot_be_scored_gets_the_floor_and_is_counted(tmp_path: Path) -> None:
    class Failing(FakeEngine):
        def _answer(self, request: Request, length: int) -> Completion:
            if request.adapter == "g1-m2":
                return Completion("abc", (1,), "error", error="logits are NaN")
            return super()._answer(request, length)

    _, run, _ = start(tmp_path / "run", make_config(generations=3), Failing())
    train = len(tasks.get("conciseness").examples("train"))
    assert [r.get("failed") for r in run.metrics()[:3]] == [0, train, 0]
    assert read(run.journal_path).entries[1].fitness[2] == tasks.get("conciseness").reward_floor


def test_a_task_that_raises_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks.get("conciseness")
    real = type(task).score
    calls = []

    def score(self: Any, example: Any, completion: str) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("their bug")
        judged = real(self, example, completion)
        # The fourth call asks what the third's failure is worth: an empty text.
        return replace(judged, reward=float("nan")) if len(calls) == 5 else judged

    monkeypatch.setattr(type(task), "score", score)
    _, run, _ = start(tmp_path / "run", make_config(generations=2))
    assert run.metrics()[0]["failed"] == 2
    assert all(np.isfinite(read(run.journal_path).entries[0].fitness))


def test_windows_walk_the_training_set_and_go_around() -> None:
    assert window(0, 128, 1600) == tuple(range(128))
    assert window(1, 128, 1600) == tuple(range(128, 256))
    assert window(12, 128, 1600) == (*range(1536, 1600), *range(64))
    assert window(13, 128, 1600)[0] == 64
    assert window(7, None, 3) == window(7, 5, 3) == (0, 1, 2) == tuple(sorted(window(2, 3, 3)))
    seen = [i for g in range(25) for i in window(g, 128, 1600)]
    assert all(seen.count(i) == 2 for i in range(0, 1600, 97))


def test_the_test_subset_is_fixed_and_seeded() -> None:
    subset = fixed_subset(400, 100, 3)
    assert subset == fixed_subset(400, 100, 3)
    assert len(set(subset)) == 100
    assert list(subset) == sorted(subset)
    assert subset != fixed_subset(400, 100, 4)
    assert 20 < sum(i < 200 for i in subset) < 80
    assert fixed_subset(8, 100, 3) == fixed_subset(8, None, 3) == tuple(range(8))
