"""The whole cluster but Ray: jobs, losses and resumption give the bits of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_engine import FakeEngine, make_config, workbench
from local_crew import LocalCrew
from loralab.adapters.state import AdapterState, Factors
from loralab.config import EvolveConfig
from loralab.config.evolve import ClusterConfig
from loralab.engines.base import Completion, Request
from loralab.errors import UserError
from loralab.evolution.cluster import opening, worker
from loralab.evolution.cluster.messages import floats, pack, unpack
from loralab.evolution.cluster.worker import Worker
from loralab.evolution.events import Event, GenerationDone, Notice
from loralab.evolution.start import Start
from loralab.evolution.trainer import Result, evolve
from loralab.evolution.workbench import Open, Workbench
from loralab.run import Run

MODES: list[dict[str, Any]] = [
    {"noise_on": "B"},
    {"noise_on": "AB", "optimizer": {"name": "momentum", "lr": 0.5}, "test_samples": 5},
    {"noise_on": "weights", "noise_rank": 2, "optimizer": {"lr": 0.5}},
    {"noise_on": "B", "dtype": "bfloat16", "per_prompt_baseline": True},
    {"noise_on": "B", "antithetic": False, "population": 7, "samples_per_generation": 1},
]
TIMES = ("seconds", "tokens_per_second")
TRAFFIC = ("sent_bytes", "received_bytes", "setup_bytes", "jobs_again", "actors")


class Varied(FakeEngine):
    """Answers that tell prompts apart, some of them looping."""

    def _answer(self, request: Request, length: int) -> Completion:
        text = "ab c" * (length // 4) if "?" in str(request.prompt) else "x" * length
        return Completion(text, tuple(range(length)), "stop")


def clustered(config: EvolveConfig, **cluster: Any) -> EvolveConfig:
    return config.model_copy(update={"cluster": ClusterConfig(**cluster)})


class Stage:
    """Runs searches on local crews."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self._monkeypatch, self._path = monkeypatch, path
        # Processes that score start slowly; the tests with Ray have them.
        monkeypatch.setattr(worker, "scorer_of", lambda config: None)
        self.crews: list[LocalCrew] = []
        self.events: list[Event] = []

    def run(
        self,
        name: str,
        config: EvolveConfig,
        open_workbench: Open | None = None,
        resume: bool = False,
        **crew: Any,
    ) -> tuple[Result, Run]:
        def hired(*arguments: Any) -> LocalCrew:
            self.crews.append(LocalCrew(*arguments, **crew))
            return self.crews[-1]

        self._monkeypatch.setattr(opening, "RayCrew", hired)
        dtype = getattr(torch, config.dtype)
        values = config.to_dict()
        path = self._path / name
        with Run.resume(path, values) if resume else Run.create(path, values) as run:
            made = open_workbench or (lambda _: workbench(Varied(), dtype))
            return evolve(config, run, self.events.append, made), run

    @property
    def notices(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice)]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    return Stage(monkeypatch, tmp_path)


def journal(run: Run) -> list[bytes]:
    """The generations: the header differs by its `cluster`, and with it every checksum."""
    lines = run.journal_path.read_bytes().splitlines()[1:]
    return [line.split(b', "sum"')[0] for line in lines]


def told(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES + TRAFFIC} for row in run.metrics()]


def written(run: Run) -> dict[Any, Any]:
    return {(r["generation"], r["phase"], r["split"], r["example"]): r for r in run.completions()}


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values()))[:30])
def test_actors_that_come_and_go_end_where_one_process_does(
    stage: Stage, mode: dict[str, Any]
) -> None:
    config = make_config(**{"generations": 6, "eval_every": 2} | mode)
    whole, one = stage.run("one", config)
    options: dict[str, Any]
    for name, options, crew in (
        ("alone", {"actors": 1}, {}),
        ("many", {"actors": 3, "pairs_per_unit": 2}, {"seed": 1}),
        ("losing", {"actors": 3, "restarts": 999}, {"losses": 0.25, "seed": 2}),
    ):
        result, run = stage.run(name, clustered(config, **options), **crew)
        assert replace(result, adapter=whole.adapter) == whole
        assert journal(run) == journal(one)
        for row, other in zip(told(run), told(one), strict=True):
            assert row == pytest.approx(other, rel=1e-12)
        assert written(run) == written(one)
        for file in (one.path / "adapter").iterdir():
            assert (run.path / "adapter" / file.name).read_bytes() == file.read_bytes()
        assert stage.crews[-1].closed
    assert any("is gone: its work is done again" in text for text in stage.notices)
    assert sum(row.get("jobs_again", 0) for row in run.metrics()) > 2


def test_a_resumed_search_ends_in_the_same_bits(stage: Stage) -> None:
    config = clustered(make_config(generations=7, eval_every=2), actors=2)
    whole, run = stage.run("whole", config)
    stage.run("cut", config)
    cut = run.path.with_name("cut") / "journal.jsonl"
    lines = cut.read_bytes().splitlines(True)
    cut.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    result, again = stage.run("cut", config, resume=True)
    assert replace(result, adapter=whole.adapter) == whole
    assert again.journal_path.read_bytes() == run.journal_path.read_bytes()


def test_a_start_that_was_made_is_sent_once(stage: Stage) -> None:
    made = 0

    def initialised(config: Any, task: Any) -> Start:
        nonlocal made
        made += 1
        g = torch.Generator().manual_seed(3)
        shapes = {name: weight.shape for name, weight in workbench().weights.items()}
        factors = {
            n: Factors(torch.randn(4, i, generator=g), 0.01 * torch.randn(o, 4, generator=g))
            for n, (o, i) in shapes.items()
        }
        return Start(AdapterState(factors, 1.0), AdapterState(factors, 1.0))

    def bench(_: EvolveConfig) -> Workbench:
        return replace(workbench(), initialise=initialised)

    plain = make_config(generations=4).model_dump(mode="json")
    plain["adapter"]["init"] = {"name": "pissa"}
    config = EvolveConfig.model_validate(plain)
    whole, one = stage.run("one", config, bench)
    options = {"actors": 2, "restarts": 99}
    result, run = stage.run("two", clustered(config, **options), bench, losses=0.1, seed=4)
    assert made == 2, "once in each driver, never on an actor"
    assert replace(result, adapter=whole.adapter) == whole
    assert journal(run) == journal(one)
    size = sum(path.stat().st_size for path in (run.path / "start").rglob("*.safetensors"))
    rows = run.metrics()
    assert rows[0]["setup_bytes"] > 2 * size
    assert all(row["sent_bytes"] < size for row in rows[:4])


def test_traffic_is_counted_and_small(stage: Stage) -> None:
    config = clustered(make_config(generations=3, population=40, eval_every=1), actors=4)
    _, run = stage.run("run", config)
    rows = run.metrics()[:3]
    assert all(1000 < row["sent_bytes"] + row["received_bytes"] < 40_000 for row in rows)
    sent = sum(row["sent_bytes"] + row["setup_bytes"] for row in rows)
    assert sent < 2 * stage.crews[-1].bytes
    messages = [kind for _, kind in stage.crews[-1].kinds]
    assert messages.count("unit") == 3 * 20
    # Every actor has worked, and been told of every generation.
    assert {worker for worker, kind in stage.crews[-1].kinds if kind == "unit"} == {0, 1, 2, 3}
    done = [event for event in stage.events if isinstance(event, GenerationDone)]
    assert len(done) == 3


def test_of_a_generation_an_actor_is_sent_a_number_a_pair(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, real = list[Any](), LocalCrew.call

    def call(crew: LocalCrew, actor: Worker, message: bytes, files: Any) -> int:
        sent.extend(unpack(message).get("entries", ()))
        return real(crew, actor, message, files)

    monkeypatch.setattr(LocalCrew, "call", call)
    config = make_config(generations=3, per_prompt_baseline=True)
    stage.run("run", clustered(config, actors=2))
    assert sent
    for entry in sent:
        assert set(entry) == {"generation", "weights", "held_out"}
        assert len(floats(entry["weights"])) == 4


def test_both_members_of_a_pair_meet_on_one_actor(stage: Stage) -> None:
    met: dict[int, set[str]] = {}

    class Noting(FakeEngine):
        def generate(self, requests: Any, progress: Any = None) -> list[Completion]:
            met.setdefault(id(self), set()).update(r.adapter for r in requests if r.adapter)
            return super().generate(requests, progress)

    config = clustered(make_config(generations=2, eval_every=9), actors=3)
    stage.run("run", config, lambda _: workbench(Noting()))
    for generation in range(2):
        for pair in range(4):
            names = {f"g{generation}-m{2 * pair}", f"g{generation}-m{2 * pair + 1}"}
            assert sum(bool(names & seen) for seen in met.values()) == 1
            assert any(names <= seen for seen in met.values())


def test_an_actor_that_is_lost_too_often_is_left_out(stage: Stage) -> None:
    config = clustered(make_config(generations=40), actors=2, restarts=2)
    with pytest.raises(UserError, match=r"no actor is left \(killed by the test\).*--resume"):
        stage.run("run", config, losses=0.5, seed=1)
    assert sum("lost 3 times and is not started again" in text for text in stage.notices) == 2
    assert stage.crews[-1].closed


class Broken(FakeEngine):
    """Fails in one generation, with an error that a user can mend or not."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def generate(self, requests: Any, progress: Any = None) -> list[Completion]:
        if any(str(request.adapter).startswith("g1-") for request in requests):
            raise self._error
        return super().generate(requests, progress)


class Decaying(FakeEngine):
    """Every adapter from generation 5 on writes far too much."""

    def _answer(self, request: Request, length: int) -> Completion:
        late = request.adapter is not None and int(request.adapter[1:].split("-")[0]) >= 5
        return super()._answer(request, length + 500 * late)


def test_the_best_point_is_tested_again_though_the_search_went_on(stage: Stage) -> None:
    config = make_config(generations=9, eval_every=2)
    whole, one = stage.run("one", config, lambda _: workbench(Decaying()))
    assert whole.best_generation == 4
    options = {"actors": 2, "restarts": 99}
    result, run = stage.run(
        "two", clustered(config, **options), lambda _: workbench(Decaying()), losses=0.2, seed=5
    )
    assert replace(result, adapter=whole.adapter) == whole
    assert written(run) == written(one)


def test_an_actor_that_takes_generations_to_begin_catches_up(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, held = LocalCrew.wait, [60]

    def wait(crew: LocalCrew, tickets: Any, seconds: float) -> list[int]:
        """Answers of the second actor's beginning come when the first has done much."""
        held[0] -= 1
        waits = {
            ticket
            for ticket in tickets
            if held[0] > 0
            and crew._calls[ticket][0] is crew.workers[1]
            and unpack(crew._calls[ticket][1])["kind"] == "begin"
        }
        return real(crew, [ticket for ticket in tickets if ticket not in waits], seconds)

    monkeypatch.setattr(LocalCrew, "wait", wait)
    config = make_config(generations=12, eval_every=5)
    whole, _ = stage.run("one", config)
    result, _ = stage.run("two", clustered(config, actors=2), seed=1)
    assert replace(result, adapter=whole.adapter) == whole
    units = [worker for worker, kind in stage.crews[-1].kinds if kind == "unit"]
    assert set(units[:16]) == {0}
    assert set(units[-16:]) == {0, 1}


def test_what_a_user_can_mend_stops_the_run_at_once(stage: Stage) -> None:
    config = clustered(make_config(generations=3), actors=2)
    with pytest.raises(UserError, match=r"actor \d on .*: no such file"):
        stage.run("run", config, lambda _: workbench(Broken(UserError("no such file"))))


def test_what_breaks_an_actor_is_tried_on_another(stage: Stage) -> None:
    config = clustered(make_config(generations=3), actors=2, restarts=1)
    with pytest.raises(UserError, match=r"no actor is left \(ZeroDivisionError: theirs"):
        stage.run("run", config, lambda _: workbench(Broken(ZeroDivisionError("theirs"))))
    assert len(stage.crews[-1].workers) == 4


@pytest.mark.parametrize(
    ("engine", "shift", "message"),
    [
        ("other", 0.0, "runs kernel other, the one on .* fake: every node needs the same engine"),
        ("fake", 1.0, "holds another model"),
    ],
)
def test_actors_must_be_alike(stage: Stage, engine: str, shift: float, message: str) -> None:
    opened = 0

    def unlike(_: EvolveConfig) -> Workbench:
        nonlocal opened
        opened += 1
        bench = workbench(FakeEngine(engine if opened == 3 else "fake"))
        moved = {n: w + shift * (opened == 3) for n, w in bench.weights.items()}
        return replace(bench, weights=moved)

    with pytest.raises(UserError, match=message):
        stage.run("run", clustered(make_config(), actors=2), unlike)


def test_an_actor_at_another_point_stops_the_run(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Worker._advanced

    def drifting(self: Worker, job: Any, files: Any) -> dict[str, Any]:
        answer = real(self, job, files)
        if answer["generation"] == 2:
            assert self._state is not None
            self._state = replace(self._state, master=self._state.master * 1.0000002)
        return answer

    monkeypatch.setattr(Worker, "_advanced", drifting)
    config = clustered(make_config(generations=4), actors=2)
    with pytest.raises(
        UserError, match=r"works out another point for generation 2 .*the same versions.*--resume"
    ):
        stage.run("run", config)


def test_messages_keep_every_bit_and_are_compressed() -> None:
    message = {"a": [0.1 + 0.2, 1e-300, -0.0], "b": "é\ud800", "c": None, "d": float("nan")}
    again = unpack(pack(message))
    assert repr(again) == repr(message)
    assert len(pack({"rewards": [0.0] * 10_000})) < 200
