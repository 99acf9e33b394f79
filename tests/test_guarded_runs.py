"""The guard in loralab's own runs: on by default, in the run's directory and report."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from fake_engine import FakeEngine, make_config, workbench
from loralab import tasks
from loralab.adapters.attach import targeted_weights
from loralab.adapters.scale import analyse
from loralab.adapters.state import AdapterState, Factors
from loralab.config import EvolveConfig, SftConfig, parse
from loralab.engines.batched import BatchedEngine
from loralab.errors import UserError
from loralab.evolution import guarded
from loralab.evolution.adapter_space import AdapterSpace, adapter_sigmas
from loralab.evolution.centre import subject_of
from loralab.evolution.events import Event, Notice
from loralab.evolution.space import Centre
from loralab.evolution.start import start_adapter
from loralab.evolution.trainer import evolve
from loralab.evolution.workbench import Workbench
from loralab.gradient.events import Remark, TrainingEvent
from loralab.gradient.fine_tune import fine_tune
from loralab.health.divergence import DivergenceProbe, OwnDivergenceProbe
from loralab.health.findings import Finding
from loralab.health.look import Subject, measure
from loralab.health.prompts import Prompt
from loralab.health.reading import Reading
from loralab.health.text import TextProbe
from loralab.health.token_classes import TokenClassProbe
from loralab.report import build_report
from loralab.run import Run
from loralab.tasks.base import Score

GUARDED = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guarded")
    tiny.model("llama").save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    rows = [{"prompt": tiny.words(3, i), "completion": tiny.words(4, 99 + i)} for i in range(20)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(folder: Path, guard: Any = None, lr: float = 5e-3, **more: Any) -> SftConfig:
    values: dict[str, Any] = {
        "kind": "sft",
        "name": "tiny",
        "model": str(folder / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "data": {"path": str(folder / "rows.jsonl"), "test_share": 0.2},
        "adapter": {"rank": 4, "alpha": 8.0},
        "training": {"steps": 6, "batch_size": 4, "lr": lr, "save_every": 3},
        "evaluation": {"limit": 1},
        "generation": {"max_new_tokens": 4},
        "guard": {"prompts": [tiny.words(4, 7), tiny.words(5, 8)]} if guard is None else guard,
        **more,
    }
    made = parse(values, "test")
    assert isinstance(made, SftConfig)
    return made


def run_it(path: Path, config: SftConfig) -> tuple[Any, Run, list[TrainingEvent]]:
    events: list[TrainingEvent] = []
    values = config.to_dict()
    fresh = not (path / "config.yaml").exists()
    with Run.create(path, values) if fresh else Run.resume(path, values) as run:
        return fine_tune(config, run, events.append), run, events


def test_a_run_is_looked_at_and_its_report_shows_the_text_in_order(
    folder: Path, tmp_path: Path
) -> None:
    trained, run, events = run_it(tmp_path / "run", config_for(folder))
    assert trained.complete
    readings = [Reading.from_json(row) for row in run.readings()]
    assert [one.step for one in readings] == [0, 1, 5, 6]
    assert readings[0].values["kl"] == pytest.approx(0, abs=1e-6)
    assert readings[-1].values["kl"] > 0
    assert readings[-1].values["loss.content"] > 0
    said = [event.text for event in events if isinstance(event, Remark)]
    assert any(line.startswith("guard: ") for line in said)
    build_report(run.path)
    page = (run.path / "report.html").read_text()
    assert "What it wrote, look by look" in page
    where = [page.index(f">Step {step}<") for step in (0, 1, 5, 6)]
    assert where == sorted(where)
    # The seconds of a step are of training alone.
    seconds = sum(row["seconds"] for row in run.metrics() if "seconds" in row)
    assert seconds < sum(one.seconds for one in readings)


def test_null_switches_it_off_and_changes_no_bit(folder: Path, tmp_path: Path) -> None:
    values = config_for(folder).to_dict() | {"guard": None}
    off = parse(values, "test")
    assert isinstance(off, SftConfig)
    _, quiet, _ = run_it(tmp_path / "off", off)
    assert not (quiet.path / "readings.jsonl").exists()
    _, watched, _ = run_it(tmp_path / "on", config_for(folder))
    name = "adapter/adapter_model.safetensors"
    assert (quiet.path / name).read_bytes() == (watched.path / name).read_bytes()
    losses = [[row.get("loss") for row in run.metrics()] for run in (quiet, watched)]
    assert losses[0] == losses[1]


def test_stop_ends_a_run_that_can_be_resumed(folder: Path, tmp_path: Path) -> None:
    guard = {"action": "stop", "prompts": [tiny.words(4, 7), tiny.words(5, 8)]}
    trained, run, _ = run_it(tmp_path / "run", config_for(folder, guard, lr=3.0))
    assert not trained.complete
    found = [Finding.from_json(row) for row in run.findings() if "severity" in row]
    assert any(one.severity == "fail" for one in found)
    build_report(run.path)
    page = (run.path / "report.html").read_text()
    assert next(one.rule for one in found if one.severity == "fail") in page


def search(path: Path, resume: bool = False, **values: Any) -> tuple[Any, Run, list[Event]]:
    config = make_config(**values)
    events: list[Event] = []
    plain = config.to_dict()
    with Run.resume(path, plain) if resume else Run.create(path, plain) as run:
        made = workbench(FakeEngine(), torch.float32)
        return evolve(config, run, events.append, lambda _: made), run, events


def test_a_search_has_its_centre_asked_and_its_generations_judged(tmp_path: Path) -> None:
    result, run, _ = search(tmp_path / "run")
    assert result.complete
    readings = [Reading.from_json(row) for row in run.readings()]
    assert [one.step for one in readings] == [0, 1, 5, 10, 12]
    assert readings[0].values["text.length"] == readings[0].values["base.text.length"]
    assert readings[-1].values["text.length"] < readings[0].values["text.length"]
    row = run.metrics()[0]
    assert 0.5 < row["informative_share"] <= 1
    assert row["distinct_share"] > 0.5


def test_a_search_is_the_same_search_without_its_guard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, watched, _ = search(tmp_path / "on")
    monkeypatch.setattr(guarded.SearchGuard, "before", lambda self, state: None)
    monkeypatch.setattr(guarded.SearchGuard, "end", lambda self, state: None)
    _, alone, _ = search(tmp_path / "off")
    assert watched.journal_path.read_bytes() == alone.journal_path.read_bytes()


def test_noise_that_changes_no_text_fails(tmp_path: Path) -> None:
    scale = {"fraction": 1e-9}
    _, run, events = search(tmp_path / "run", scale=scale)
    found = {row["rule"]: row for row in run.findings()}
    assert found["es.silent"]["severity"] == "fail"
    assert found["es.silent"]["cause"] == "es.noise_too_weak"
    said = [event.text for event in events if isinstance(event, Notice)]
    (at,) = [at for at, text in enumerate(said) if text.startswith("FAIL generation 4 es.silent:")]
    assert said[at + 1].startswith("     likely es.noise_too_weak: ")


def test_an_outlier_that_sets_the_noise_of_its_layer_is_seen() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {f"layers.{at}.{kind}": (12, 10) for at in range(6) for kind in ("o", "up")}
    weights = {name: torch.randn(shape, generator=g) * 0.02 for name, shape in shapes.items()}
    weights["layers.3.o"] *= 60
    ratios = {}
    for granularity in ("module", "layer"):
        report = analyse(weights)
        start = start_adapter(shapes, 4, 4.0, 0, None)
        wanted = report.perturbation(granularity, "mean", 0.1)  # type: ignore[arg-type]
        sigmas = adapter_sigmas(start, wanted, False, "mean", 0.1)
        space = AdapterSpace(start, sigmas, torch.float32)
        ratios[granularity] = guarded.noise_ratios(space, weights)
    assert set(ratios["module"]) == set(weights)
    assert all(r == pytest.approx(0.1, rel=0.01) for r in ratios["module"].values())
    assert guarded.dominance(ratios["module"]) < 1.1
    assert guarded.dominance(ratios["layer"]) > 5


def centre_of(model: Any, size: float = 0.0) -> Centre:
    g = torch.Generator().manual_seed(3)
    shapes = {n: m.weight.shape for n, m in model.named_modules() if n.endswith("q_proj")}
    factors = {
        n: Factors(torch.randn(2, i, generator=g), size * torch.randn(o, 2, generator=g))
        for n, (o, i) in shapes.items()
    }
    return Centre(AdapterState(factors, 1.0))


PROMPTS = tuple(Prompt(text=tiny.words(4, n), good=tiny.words(9, 50 + n)) for n in range(6))


def test_a_centre_is_measured_as_the_same_adapter_of_peft_is() -> None:
    own = tiny.model("llama")
    engine = BatchedEngine(own, tiny.tokenizer())
    seen = subject_of(engine, PROMPTS, 0)
    kept = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    start = seen.reading(centre_of(own), 0).values
    assert start["kl"] == pytest.approx(0, abs=1e-7)
    assert start["loss.all"] == start["base.loss.all"]
    moved = seen.reading(centre_of(own, 0.3), 1).values
    names = [n for n, m in own.named_modules() if n.endswith("q_proj")]
    model = get_peft_model(tiny.model("llama"), LoraConfig(r=2, lora_alpha=2, target_modules=names))
    for name, pair in centre_of(own, 0.3).adapter.factors.items():  # type: ignore[union-attr]
        layer: Any = model.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(pair.A)
        layer.lora_B["default"].weight.data.copy_(pair.B)
    other = Subject(model, tiny.tokenizer(), prompts=PROMPTS)
    probes = [TextProbe(), DivergenceProbe(), OwnDivergenceProbe(), TokenClassProbe()]
    wanted = measure(other.look(), probes, 1).values
    assert moved["kl"] > 0.01
    assert dict(moved) == pytest.approx(dict(wanted), abs=1e-4, nan_ok=True)
    assert moved["base.text.length"] == start["text.length"]
    # A change of the weights is the same as an adapter of it, and is taken back.
    change = {n: p.B @ p.A for n, p in centre_of(own, 0.3).adapter.factors.items()}  # type: ignore[union-attr]
    whole = seen.reading(Centre(None, change), 2).values
    assert dict(whole) == pytest.approx(dict(wanted), abs=1e-4, nan_ok=True)
    engine.set_base({})
    assert all(torch.equal(kept[n], t) for n, t in own.state_dict().items())


def search_config(fraction: float, generations: int) -> EvolveConfig:
    scale = {"fraction": fraction}
    config = make_config(generations=generations, population=4, eval_every=9, scale=scale)
    values = config.to_dict() | {"guard": {"prompts": [one.text for one in PROMPTS]}}
    values["generation"] = {"max_new_tokens": 4}
    made = parse(values, "test")
    assert isinstance(made, EvolveConfig)
    return made


def opened(model: Any, config: EvolveConfig) -> Workbench:
    weights = targeted_weights(model, config.adapter)
    return Workbench(BatchedEngine(model, tiny.tokenizer()), weights, lambda _: None)


def space_of(bench: Workbench) -> AdapterSpace:
    shapes = {name: (w.shape[0], w.shape[1]) for name, w in bench.weights.items()}
    started = start_adapter(shapes, 4, 4.0, 0, None)
    return AdapterSpace(started, {f"{n}.B": 0.1 for n in started.factors}, torch.float32)


def searched(path: Path, fraction: float, generations: int) -> Run:
    """A search over a tiny model, its guard on."""
    config = search_config(fraction, generations)
    made = opened(tiny.model("llama"), config)
    with Run.create(path, config.to_dict()) as run:
        evolve(config, run, lambda _: None, lambda _: made)
    return run


def test_a_search_over_a_model_reads_its_expectations(tmp_path: Path) -> None:
    run = searched(tmp_path / "run", 3.0, generations=2)
    readings = [Reading.from_json(row) for row in run.readings()]
    assert [one.step for one in readings] == [0, 1, 2]
    assert readings[0].values["kl"] == pytest.approx(0, abs=1e-7)
    assert readings[-1].values["kl"] > 0
    for one in readings:
        assert {"loss.content", "base.loss.prompt_gain", "text.top_token_share"} <= set(one.values)
        # Nothing at all is nearer to the targets of conciseness than what the base says.
        assert 0.2 < one.values["es.unearned"] < 1


def test_noise_that_moves_no_expectation_fails_before_the_first_generation(
    tmp_path: Path,
) -> None:
    """KL goes with the square of the noise."""
    kl = {}
    for fraction in (0.3, 1e-2, 1e-3):
        run = searched(tmp_path / str(fraction), fraction, generations=2)
        kl[fraction] = run.readings()[0]["values"]["es.member_kl"]
        found = [row for row in run.findings() if row.get("rule") == "es.weak_noise"]
        assert bool(found) == (kl[fraction] < 4e-3)
        assert all(row["step"] == 0 for row in found), "told once, at the start"
    assert kl[0.3] > 1e-2 > 1e-3 > kl[1e-3]
    assert kl[1e-2] == pytest.approx(100 * kl[1e-3], rel=0.3)


def test_the_reach_of_the_noise_is_known_after_a_kill(tmp_path: Path) -> None:
    values = search_config(1e-3, generations=2)
    model = tiny.model("llama")
    made = opened(model, values)
    told = []
    with Run.create(tmp_path / "run", values.to_dict()) as run:
        evolve(values, run, lambda _: None, lambda _: made)
        for generation in (2, 0):
            guard = guarded.SearchGuard(values, run, made, space_of(made), lambda _: None)
            guard.resume(generation)
            told.append(guard._facts)
    assert told[0] is not None
    assert set(told[0]) == {"es.unearned", "es.member_kl"}
    assert told[0]["es.member_kl"] < 1e-3
    assert told[1] is None, "begun anew it is measured anew"


def test_a_reward_for_being_short_is_seen_before_the_first_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tasks.get("conciseness")
    monkeypatch.setattr(own, "score", lambda example, text: Score(-float(len(text))))
    monkeypatch.setattr(tasks, "get", lambda name, **options: own)
    _, run, _ = search(tmp_path / "run", generations=1)
    found = {row["rule"]: row for row in run.findings()}
    assert found["es.unearned"]["severity"] == "fail"
    assert found["es.unearned"]["cause"] == "reward.exploitable"
    assert found["es.unearned"]["step"] == 0


def test_a_resumed_search_looks_as_often_as_its_own_time_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(guarded, "perf_counter", lambda: clock[0])
    config = make_config()
    engine = workbench(FakeEngine(), torch.float32)
    with Run.create(tmp_path / "run", config.to_dict()) as run:
        guard = guarded.SearchGuard(config, run, engine, space_of(engine), lambda _: None)
        guard.resume(1000)
        looked = []

        def look(state: Any) -> None:
            looked.append(state.generation)
            guard._last, guard._cost = state.generation, 1.0
            guard._spent += 1.0
            clock[0] += 1.0

        monkeypatch.setattr(guard, "_look", look)
        for generation in range(1000, 1200):
            guard.before(SimpleNamespace(generation=generation))  # type: ignore[arg-type]
            clock[0] += 1.0
    # Of a second each, 3 % of the time: every 34th generation, not every 34 x 1000th.
    assert looked[0] == 1000
    assert all(b - a == 34 for a, b in pairwise(looked))
    assert len(looked) == 6


def test_a_look_that_fails_ends_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at, error in enumerate((torch.OutOfMemoryError("full"), ZeroDivisionError("by zero"))):

        def fail(*asked: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(guarded, "subject_of", lambda *given: SimpleNamespace(reading=fail))
        result, run, events = search(tmp_path / str(at))
        assert result.complete
        said = [e.text for e in events if isinstance(e, Notice) and e.text.startswith("guard:")]
        assert said == [
            "guard: fake tells no expectations: texts and the population's numbers are looked at, "
            "the divergence from the base is not",
            f"guard: looks at numbers alone: {type(error).__name__}: {error}",
        ]
        assert run.readings() == []
        monkeypatch.undo()


def test_a_reward_that_exits_on_a_text_without_merit_ends_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tasks.get("conciseness")
    real, asked = own.score, []

    def score(example: Any, text: str) -> Score:
        if not text.strip("x"):
            asked.append(text)
            raise SystemExit(3)
        return real(example, text)

    monkeypatch.setattr(own, "score", score)
    monkeypatch.setattr(tasks, "get", lambda name, **options: own)
    result, _, _ = search(tmp_path / "run", generations=1)
    assert asked
    assert result.complete


def test_a_search_cannot_be_rolled_back() -> None:
    values = make_config().to_dict() | {"guard": {"action": "rollback"}}
    with pytest.raises(UserError, match=r"guard\.action"):
        parse(values, "test")
