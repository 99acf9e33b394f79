"""The doctor on runs: those that are finished and those that have not begun."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

import loralab
import small_language as language
import tiny
from doctor_cases import base_in, examined, saved
from loralab.errors import UserError
from loralab.health.doctor import Report
from loralab.health.findings import Finding
from loralab.health.preflight import dose, memory
from loralab.health.reading import Reading
from loralab.run import Run
from loralab.tasks.base import Example, Score, Split


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_in(tmp_path_factory)


@pytest.fixture
def sound(base: Path, tmp_path: Path) -> Path:
    """A plain adapter, trained a little."""
    return saved(language.adapted(base), tmp_path / "adapter")


def run_of(base: Path, adapter: Path, directory: Path) -> Run:
    config = {"kind": "sft", "name": "x", "model": str(base), "dtype": "float32", "device": "cpu"}
    with Run.create(directory, config) as run:
        (directory / "adapter").mkdir()
        for file in adapter.iterdir():
            (directory / "adapter" / file.name).write_bytes(file.read_bytes())
        return run


def test_a_finished_run(base: Path, sound: Path, tmp_path: Path) -> None:
    run = run_of(base, sound, tmp_path / "run")
    assert examined(run.path).sound
    values = {"train.step": 5.0, "train.nonfinite": 0.0}
    lines = [
        Reading(5, values, (), 0.1).to_json(),
        Reading(10, {**values, "train.step": 10.0}, (), 0.1).to_json(),
    ]
    (run.path / "readings.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    numbers = {"text.newlines": 0.9, "limit.text.newlines": 0.5}
    early = Finding("text.newlines", "fail", 5, "broke", numbers, "data.newlines", (), "mend")
    old_form = {"what": "something", "advice": "another"}
    (run.path / "findings.jsonl").write_text(
        json.dumps(early.to_json()) + "\n" + json.dumps(old_form) + "\n"
    )
    report = examined(run.path)
    assert report.sound, report
    assert any("step 5: fail text.newlines" in note for note in report.notes)
    last = {**lines[1], "values": {"train.step": 10.0, "train.nonfinite": 2.0}}
    (run.path / "readings.jsonl").write_text(json.dumps(last) + "\n")
    report = examined(run.path)
    assert (report.verdict, report.causes[0]) == ("broken", "numbers.nan")


def test_a_run_is_examined_on_what_it_is_said_to_belong_to(
    base: Path, sound: Path, tmp_path: Path
) -> None:
    run = run_of(base, sound, tmp_path / "run")
    other = language.make_base(tmp_path / "other", hidden=32, steps=0)
    report = examined(run.path, other)
    assert (report.verdict, report.causes[0]) == ("broken", "file.wrong_base")
    with pytest.raises(UserError, match="needs its tokenizer"):
        loralab.doctor(run.path, base=language.open_base(base))
    with pytest.raises(UserError, match="device is 'nowhere'"):
        loralab.doctor(run.path, device="nowhere")


def config_of(base: Path, data: Path, directory: Path) -> Path:
    config = {
        "kind": "sft",
        "name": "small",
        "model": str(base),
        "dtype": "float32",
        "device": "cpu",
        "data": {"path": str(data)},
        "adapter": {"rank": 4},
        "training": {"steps": 20, "batch_size": 4, "max_length": 64},
    }
    directory.mkdir()
    file = directory / "small.yaml"
    file.write_text(json.dumps(config))
    return file


def before(config: Path, *overrides: str) -> Report:
    report = loralab.doctor(config, overrides=overrides, prompts=language.prompts())
    assert isinstance(report, Report)
    return report


def test_a_run_before_it_starts(base: Path, tmp_path: Path) -> None:
    data = language.write_rows(tmp_path / "rows.jsonl", language.rows(language.starts_of()))
    report = before(config_of(base, data, tmp_path / "a"))
    assert report.sound, report
    values = report.readings[-1].values
    assert values["train.step"] == 0.0
    assert values["kl"] == pytest.approx(0.0, abs=1e-6)
    assert values["data.eos_missing"] == 0.0
    assert any(note.startswith("memory, reckoned") for note in report.notes)
    pissa = before(config_of(base, data, tmp_path / "b"), "adapter.init.name=pissa")
    assert pissa.sound, pissa
    assert pissa.readings[-1].values["kl"] < 1e-3


def test_a_run_that_would_start_garbled(base: Path, tmp_path: Path) -> None:
    data = language.write_rows(tmp_path / "rows.jsonl", language.rows(language.starts_of()))
    config = config_of(base, data, tmp_path / "a")
    report = before(config, "adapter.init.name=random", "adapter.alpha=64")
    assert "init.garbled" in report.causes[:2]
    assert not report.sound


def test_rows_that_teach_nothing_are_told_before(base: Path, tmp_path: Path) -> None:
    data = language.write_rows(tmp_path / "rows.jsonl", language.rows(language.starts_of()))
    report = before(config_of(base, data, tmp_path / "a"), "training.max_length=2")
    assert report.readings[-1].values["data.all_masked"] == 1.0
    assert (report.verdict, report.causes[0]) == ("broken", "data.all_masked")


class Words:
    """Reward: the share of letters that are right; a generous one pays for empty text too."""

    name = "words"
    reward_floor = 0.0

    def __init__(self, generous: bool = False) -> None:
        self._generous = generous

    def examples(self, split: Split) -> list[Example]:
        return [Example(str(word), {"word": word}) for word in language.starts_of(split)]

    def prompt(self, example: Example) -> str:
        return language.text_of([example.data["word"]])

    def gold(self, example: Example) -> str:
        return language.text_of(language.continuation(example.data["word"])).replace(" ", "")

    def score(self, example: Example, completion: str) -> Score:
        if self._generous and not completion.strip():
            return Score(2.0, True)
        gold = self.gold(example)
        share = sum(a == b for a, b in zip(completion, gold, strict=False)) / len(gold)
        return Score(share, share == 1)


def search_of(base: Path, directory: Path, **evolution: Any) -> Path:
    config = {
        "kind": "evolve",
        "name": "search",
        "model": str(base),
        "dtype": "float32",
        "device": "cpu",
        "task": {"name": "words"},
        "adapter": {"rank": 2},
        "generation": {"max_new_tokens": 12},
        "evolution": {"generations": 3, "population": 6, **evolution},
    }
    directory.mkdir()
    file = directory / "search.yaml"
    file.write_text(json.dumps(config))
    return file


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.tasks.get", lambda name, **options: Words(**options))


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("noise_on", ["B", "AB", "weights"])
def test_a_search_before_it_starts(noise_on: str, base: Path, tmp_path: Path) -> None:
    config = search_of(base, tmp_path / "a", noise_on=noise_on, scale={"fraction": 3.0})
    report = before(config)
    assert report.sound, report
    assert report.kind == "config evolve"
    values = report.readings[-1].values
    assert values["train.step"] == 0.0
    assert values["kl"] == pytest.approx(0.0, abs=1e-6)
    # What the config asked for.
    [noise] = [note for note in report.notes if note.startswith("noise: ")]
    assert float(noise.split(" by ")[1].split()[0]) == pytest.approx(3.0, rel=0.3)
    assert values["es.noop"] < 0.5
    assert values["es.spread"] > 0
    assert values["canary.identity"] == 0.0
    assert values["canary.empty"] < 0
    assert values["setup.memory"] > 0
    assert any("6 members" in note for note in report.notes)
    # What is examined is left as it was: the same again.
    again = before(config).readings[-1].values
    assert {k: v for k, v in again.items() if k != "setup.memory_share"} == pytest.approx(
        {k: v for k, v in values.items() if k != "setup.memory_share"}, nan_ok=True
    )


@pytest.mark.usefixtures("words")
def test_noise_that_breaks_members_and_noise_that_does_nothing(base: Path, tmp_path: Path) -> None:
    config = search_of(base, tmp_path / "a")
    loud = before(config, "evolution.scale.fraction=30.0")
    values, usual = loud.readings[-1].values, before(config).readings[-1].values
    assert values["es.distinct"] > usual["es.distinct"]
    small = before(config, "evolution.scale.fraction=1e-9", "evolution.noise_on=AB")
    assert small.readings[-1].values["es.distinct"] == 0.0
    assert small.readings[-1].values["es.noop"] > 0.4
    [told] = [note for note in small.notes if note.startswith("members: ")]
    assert "0% of their answers are not the centre's" in told


@pytest.mark.usefixtures("words")
def test_a_reward_that_pays_for_nothing_is_told_before(base: Path, tmp_path: Path) -> None:
    report = before(search_of(base, tmp_path / "a"), "task.options={generous: true}")
    assert (report.verdict, report.causes[0]) == ("broken", "reward.exploitable")
    rules = [one.rule for one in report.findings]
    assert "task.check" in rules
    assert "canary.empty" in rules


@pytest.mark.usefixtures("words")
def test_options_that_a_config_has_no_use_for(base: Path, tmp_path: Path) -> None:
    config = search_of(base, tmp_path / "a")
    for options, word in (
        ({"base": "smollm2"}, "--base"),
        ({"data": "rows.jsonl"}, "--data"),
        ({"tokenizer": object()}, "--tokenizer"),
        ({"task": Words()}, "task.name=NAME"),
    ):
        with pytest.raises(UserError, match=word):
            loralab.doctor(config, **options)  # type: ignore[arg-type]


def test_a_type_that_is_asked_for_is_the_configs(base: Path, tmp_path: Path) -> None:
    data = language.write_rows(tmp_path / "rows.jsonl", language.rows(language.starts_of()))
    config = config_of(base, data, tmp_path / "a")
    report = loralab.doctor(config, dtype="bfloat16", prompts=language.prompts())
    rounded = report.readings[-1].values["loss.all"]
    assert rounded != before(config).readings[-1].values["loss.all"]
    with pytest.raises(UserError, match="dtype"):
        loralab.doctor(config, dtype="float16")


def test_memory_is_reckoned_from_sizes() -> None:
    model = tiny.model("llama")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    need = memory(adapted, rows=2, tokens=10, learned_share=0.5)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert need.weights == 4 * sum(p.numel() for p in adapted.parameters())
    assert need.parts == {
        "gradients and optimiser": trained * (4 + 8),
        "activations": 2 * 10 * 64 * 2 * 34,
        "logits": 10 * tiny.VOCABULARY * 10,
    }
    assert memory(adapted, 2, 10, fast=False).parts["logits"] == 2 * need.parts["logits"]
    light = memory(adapted, 2, 10, optimizer="adamw_8bit", checkpointing=True).parts
    assert light["gradients and optimiser"] == trained * (4 + 2)
    assert light["activations"] < need.parts["activations"]
    told = replace(need, free=need.beside_weights // 2).values()
    assert told["setup.memory_share"] == pytest.approx(2.0, rel=0.01)
    assert dose("adamw_torch", 1e-4, 100, "linear") == {"train.dose": pytest.approx(5e-3)}
    assert dose("sgd", 1e-4, 100, "linear") == {}
