"""Pipelines: every kind through, skipping, reruns, kills, and references that lead nowhere."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from loralab import config as configs
from loralab import pipeline
from loralab.cli import main
from loralab.config import PipelineConfig
from loralab.config.pipeline import merged
from loralab.durable import read_lines
from loralab.errors import UserError
from loralab.evolution.events import Notice
from loralab.gradient.events import StepDone
from loralab.planning import plan
from loralab.report import build_report
from loralab.report.stages import read_table
from loralab.run import Run
from loralab.stages.digest import content_digest, stage_digest

ALL = ("pretrain", "sft", "dpo", "verifier", "evolve", "warm", "eval")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads


@pytest.fixture
def plain(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the stages' own pages, which take longer than such small stages."""

    def build(path: Path) -> Path:
        return build_report(path) if Run.open(path).config["kind"] == "pipeline" else path

    monkeypatch.setattr(pipeline, "build_report", build)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories, reviews and preferences of few words."""
    path = tmp_path_factory.mktemp("data")
    # The two answers in every story: each is a token then, and the models find them.
    said = (" negative", " positive")
    stories = [f"the {tiny.words(3 + i % 5, i)}{said[i % 2]}" for i in range(90)]
    (path / "stories.txt").write_text("##".join(stories))
    (path / "sst2").mkdir()
    for split, count in (("train", 12), ("test", 5)):
        rows = [
            f"{tiny.words(3, i)} {'bad' if i % 2 else 'good'}\t{1 - i % 2}" for i in range(count)
        ]
        (path / "sst2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    pairs = [
        {
            "chosen": f"\n\nHuman: say {tiny.words(1, i)}\n\nAssistant: {tiny.words(3, i + 50)}",
            "rejected": f"\n\nHuman: say {tiny.words(1, i)}\n\nAssistant: {tiny.words(3, i + 99)}",
        }
        for i in range(12)
    ]
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return path


def values_for(data: Path, stages: tuple[str, ...] = ALL) -> dict[str, Any]:
    task = {"name": "sst2", "options": {"path": "inputs.sst2", "style": "plain"}}
    training = {"steps": 4, "batch_size": 2, "lr": 1e-2, "max_length": 128, "save_every": 2}
    short = {"max_new_tokens": 2}
    corpus = {"path": "inputs.stories", "separator": "##", "test_share": 0.1}
    every: dict[str, Any] = {
        "pretrain": {
            "config": "pretrain-tiny",
            "decoder": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 256,
            },
            "tokenizer": {"vocab_size": 320},
            "corpus": {"0": corpus},
            "training": {"steps": 16, "lr": 2e-2, "batch_size": 4, "max_length": 64},
            "evaluation": {"limit": 4, "every": None, "prompts": ["the "]},
            "generation": {"max_new_tokens": 4},
        },
        "sft": {
            "kind": "sft",
            "model": "stages.pretrain.model",
            "task": task,
            "adapter": {"rank": 4, "alpha": 8.0},
            "training": {**training, "steps": 6},
            "evaluation": {"limit": 2},
            "generation": short,
        },
        "dpo": {
            "kind": "dpo",
            "model": "stages.sft.model",
            "data": {"path": "inputs.pairs"},
            "adapter": {"rank": 2, "alpha": 4.0},
            "training": training,
            "evaluation": {"limit": 1},
            "dpo": {"texts": 1},
            "generation": short,
        },
        "verifier": {
            "kind": "verifier",
            "model": "stages.dpo.model",
            "task": task,
            "solutions": {"examples": 6, "samples": 4, "temperature": 1.0},
            "verifier": {"candidates": 2},
            "training": training,
            "evaluation": {"limit": 2},
            "generation": short,
        },
        "evolve": {
            "kind": "evolve",
            "model": "stages.dpo.model",
            "task": task,
            "evolution": {
                "generations": 2,
                "population": 2,
                "samples_per_generation": 2,
                "test_samples": 2,
                "eval_every": 1,
            },
            "generation": short,
            "engine": {"backend": "torch"},
        },
        "warm": {
            "kind": "evolve",
            "model": "stages.pretrain.model",
            "task": task,
            "adapter": {
                "rank": 4,
                "alpha": 8.0,
                "init": {"name": "warm_start", "options": {"path": "stages.sft.adapter"}},
            },
            "evolution": {
                "generations": 1,
                "population": 2,
                "samples_per_generation": 1,
                "test_samples": 1,
            },
            "generation": short,
            "engine": {"backend": "torch"},
        },
        "eval": {
            "kind": "eval",
            "models": {
                "pretrain": "stages.pretrain.model",
                "sft": "stages.sft.model",
                "sft-adapter": {
                    "model": "stages.pretrain.model",
                    "adapter": "stages.sft.adapter",
                },
                "evolve": {"model": "stages.dpo.model", "adapter": "stages.evolve.adapter"},
            },
            "measures": {
                "stories": {"corpus": corpus, "limit": 3},
                "text": {
                    "task": {"name": "text", "options": {"path": "inputs.stories"}},
                    "limit": 60,
                },
                "sst2": {"task": task, "limit": 2, "generation": short},
                "tries": {
                    "task": task,
                    "limit": 2,
                    "generation": {**short, "temperature": 1.0},
                    "samples": 3,
                    "k": [2],
                },
            },
        },
    }
    return {
        "kind": "pipeline",
        "name": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "inputs": {
            "stories": str(data / "stories.txt"),
            "sst2": str(data / "sst2"),
            "pairs": str(data / "pairs.jsonl"),
        },
        "stages": {name: every[name] for name in stages},
    }


def made(values: dict[str, Any], **changes: Any) -> PipelineConfig:
    """Changes by dotted key, a double underscore for each dot."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        at = values
        *path, last = key.split("__")
        for part in path:
            at = at[part]
        at[last] = value
    config = configs.parse(values, "c.yaml")
    assert isinstance(config, PipelineConfig)
    return config


def go(
    config: PipelineConfig, path: Path, on_event: Callable[[Any], None] | None = None
) -> tuple[Run, Any, list[str]]:
    notices: list[str] = []

    def listen(event: Any) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)
        if on_event is not None:
            on_event(event)

    run, result = pipeline.start(config, path, listen)
    return run, result, notices


def contents(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): content_digest([file])
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stages") / "run"
    _, result, _ = go(made(values_for(data)), path)
    assert result.complete
    assert result.ran == ALL
    return path


@pytest.fixture
def again(finished: Path, plain: None) -> Any:
    """The finished pipeline, in its own place as paths are kept in it, and put back afterwards."""
    kept = finished.with_name("kept")
    shutil.copytree(finished, kept)
    yield finished
    shutil.rmtree(finished)
    kept.rename(finished)


def test_every_stage_is_a_run_of_its_own_and_stands_in_the_table(finished: Path) -> None:
    table = read_table(Run.open(finished))
    assert table is not None
    assert [row["stage"] for row in table["rows"]] == ["pretrain", "sft", "sft", *ALL[2:-1]]
    assert table["columns"] == ["stories", "text", "sst2", "tries"]
    rows = {row.get("model") or row["stage"]: row for row in table["rows"]}
    whole = sum(
        t.numel() for t in load_file(finished / "pretrain/model/model.safetensors").values()
    )
    adapter = load_file(finished / "sft/adapter/adapter_model.safetensors")
    extra = sum(t.numel() for t in adapter.values())
    assert rows["pretrain"]["parameters"] == whole == rows["pretrain"]["trained"]
    assert rows["sft"]["parameters"] == whole
    assert rows["sft"]["trained"] == extra
    assert rows["sft-adapter"]["parameters"] == whole + extra
    assert rows["verifier"]["measures"] == {}
    assert "verify@2" in rows["verifier"]["result"]
    for name in ("pretrain", "sft", "evolve"):
        assert set(rows[name]["measures"]) == set(table["columns"])
        assert rows[name]["measures"]["sst2"]["examples"] == 2
    text = (finished / "table.md").read_text()
    assert text.splitlines()[0].split(" | ")[:3] == ["| stage", "kind", "parameters"]
    assert len(text.splitlines()) == 2 + len(table["rows"])
    page = (finished / "report.html").read_text()
    for name in ALL[:-1]:
        assert f'<a href="{name}/report.html">' in page
        assert (finished / name / "report.html").exists()


def test_an_adapter_and_the_model_it_is_merged_into_measure_the_same(finished: Path) -> None:
    found = {(r["model"], r["measure"]): r for r in Run.open(finished / "eval").metrics()}
    for text in ("stories", "text"):
        merged_, beside = (found[name, text]["perplexity"] for name in ("sft", "sft-adapter"))
        assert merged_ == pytest.approx(beside, rel=1e-4)
        assert abs(merged_ - found["pretrain", text]["perplexity"]) > 1e-2
    lines = read_lines(finished / "eval" / "completions" / "sft" / "sst2.jsonl")
    assert len(lines) == 2
    assert len(read_lines(finished / "eval" / "completions" / "sft" / "tries.jsonl")) == 2 * 3
    assert "pass@2" in found["sft", "tries"]["scores"]


def test_stages_read_what_the_ones_before_them_left(finished: Path) -> None:
    sft, dpo = Run.open(finished / "sft").config, Run.open(finished / "dpo").config
    assert sft["model"] == str(finished / "pretrain" / "model")
    assert dpo["model"] == str(finished / "sft" / "merged")
    base = load_file(finished / "pretrain" / "model" / "model.safetensors")
    tuned = load_file(finished / "sft" / "merged" / "model.safetensors")
    moved = [name for name, tensor in base.items() if not torch.equal(tensor, tuned[name])]
    assert any("q_proj" in name for name in moved)
    start = load_file(finished / "warm/start/adapter/adapter_model.safetensors")
    taught = load_file(finished / "sft/adapter/adapter_model.safetensors")
    for key, b in taught.items():
        if key.endswith("lora_B.weight"):
            a = taught[key.replace("lora_B", "lora_A")]
            given = start[key] @ start[key.replace("lora_B", "lora_A")]
            torch.testing.assert_close(given, b @ a, rtol=1e-4, atol=1e-5)


def test_what_is_unchanged_is_skipped_and_stays_to_the_byte(again: Path, data: Path) -> None:
    before = contents(again)
    _, result, notices = go(made(values_for(data)), again)
    assert result.complete
    assert (result.ran, result.skipped) == ((), ALL)
    assert sum("unchanged, kept in" in text for text in notices) == len(ALL)
    after = contents(again)
    differ = {name for name in before if before[name] != after.get(name)}
    assert differ <= {"report.html"}
    assert set(after) == set(before)


def test_a_changed_stage_and_those_that_read_it_are_made_beside_the_old(
    again: Path, data: Path
) -> None:
    before = contents(again)
    values = values_for(data)
    changed = made(
        values, stages__dpo__training={**values["stages"]["dpo"]["training"], "lr": 3e-3}
    )
    _, result, _ = go(changed, again)
    assert result.ran == ("dpo", "verifier", "evolve", "eval")
    assert result.skipped == ("pretrain", "sft", "warm")
    for name in ("dpo-2", "verifier-2", "evolve-2", "eval-2"):
        assert (again / name / "config.yaml").exists()
    assert Run.open(again / "evolve-2").config["model"] == str(again / "dpo-2" / "merged")
    after = contents(again)
    old = {name for name in before if "/" in name}
    assert all(before[name] == after[name] for name in old)
    for name in ("config.yaml", "table.md"):
        kept = name.replace(".", "-1.")
        assert after[kept] == before[name] != after[name]

    _, result, _ = go(made(values), again)  # back: everything is still there
    assert result.ran == ()


def test_new_data_make_a_new_stage(again: Path, data: Path) -> None:
    file = data / "sst2" / "train.tsv"
    text = file.read_text()
    stages = ("pretrain", "sft")
    try:
        file.write_text(text + "one more line\t1\n")
        _, result, _ = go(made(values_for(data, stages)), again)
    finally:
        file.write_text(text)
    assert (result.ran, result.skipped) == (("sft",), ("pretrain",))


def test_a_killed_stage_goes_on_where_it_was(
    finished: Path, plain: None, data: Path, tmp_path: Path
) -> None:
    stages = ("pretrain", "sft")
    config, path = made(values_for(data, stages)), tmp_path / "run"
    path.mkdir()
    # What the first stage left serves again: only the second one is killed.
    shutil.copytree(finished / "pretrain", path / "pretrain")
    shutil.copy(finished / "config.yaml", path)
    line = (finished / "journal.jsonl").read_text().splitlines()[:2]
    (path / "journal.jsonl").write_text("\n".join(line) + "\n")
    child = os.fork()
    if child == 0:

        def kill(event: Any) -> None:
            if isinstance(event, StepDone) and event.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            go(config, path, kill)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert read_lines(path / "journal.jsonl")[-1]["event"] == "began"
    steps: list[int] = []

    def note(event: Any) -> None:
        if isinstance(event, StepDone):
            steps.append(event.step)

    _, result, _ = go(config, path, note)
    assert (result.ran, result.skipped) == (("sft",), ("pretrain",))
    assert steps == [3, 4, 5, 6]  # after the checkpoint of step 2
    assert [r["step"] for r in Run.open(path / "sft").metrics() if "loss" in r] == [*range(1, 7)]
    whole, resumed = (
        load_file(place / "sft" / "adapter" / "adapter_model.safetensors")
        for place in (finished, path)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_signal_stops_after_the_step_and_says_how_to_go_on(
    plain: None,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps(values_for(data, ("pretrain", "sft"))))
    monkeypatch.chdir(tmp_path)
    from loralab.display import Display

    shown = Display.__call__

    def stop(self: Any, event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 3 and event.of == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        shown(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "__call__", stop)
        assert main(["run", str(file)]) == 130
    said = capsys.readouterr().err
    assert "stopping after the step in flight" in said
    assert "continue with: loralab run --resume --run-dir runs/tiny\n" in said
    assert main(["run", "--resume", "--run-dir", "runs/tiny"]) == 0
    said = capsys.readouterr().err
    assert "step 6/6" in said
    assert "step 3/6" not in said
    assert "pretrain" in said
    assert "trained" in said
    assert main(["run", str(file), "stages.sft.training.steps=5"]) == 0
    assert (tmp_path / "runs" / "tiny" / "sft-2").exists()


def test_what_goes_wrong_in_a_stage_names_it_and_keeps_the_others(
    plain: None, data: Path, tmp_path: Path
) -> None:
    values = values_for(data, ("pretrain", "sft"))
    values["stages"]["sft"]["training"]["max_length"] = 3
    path = tmp_path / "run"
    with pytest.raises(UserError, match=r"^stage sft: row 1 .*raise it") as caught:
        go(made(values), path)
    assert "\n" not in str(caught.value)
    assert not (path / "sft").exists()
    values["stages"]["sft"]["training"]["max_length"] = 128
    _, result, _ = go(made(values), path)
    assert (result.ran, result.skipped) == (("sft",), ("pretrain",))
    assert (path / "sft" / "adapter").exists()


def test_a_pipeline_does_not_go_on_in_another_runs_directory(finished: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"holds a run of kind 'sft', no pipeline"):
        go(made(values_for(data)), finished / "sft")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sft__model", "stages.pretrian.model", r"no stage 'pretrian' .*did you mean 'pretrain'"),
        ("sft__model", "stages.dpo.model", r"put dpo before this one"),
        ("sft__model", "stages.sft.model", r"put sft before this one"),
        ("sft__model", "stages.pretrain", r"expected stages.NAME.OUTPUT, as in"),
        ("sft__model", "stages.pretrain.adapter", r"stage pretrain leaves model"),
        ("dpo__model", "stages.sft.adapter", r"expected stages.sft.model"),
        ("evolve__model", "stages.verifier.model", r"leaves nothing that another stage can read"),
        ("sft__task", {"name": "sst2", "options": {"path": "inputs.st"}}, r"inputs are stories"),
        ("sft__stpes", 3, r"stage sft: unknown key stpes"),
        ("sft__kind", "pipeline", r"a pipeline holds no other one"),
        ("sft__config", "no-such", r"config 'no-such': no such file"),
        ("sft__adapter", {"type": "lslora"}, r"stage dpo: .*stage sft leaves adapter$"),
        ("dpo__data", {"path": "stages.sft.adapter"}, r"stage dpo: data.path is .*takes a data"),
    ],
)
def test_what_leads_nowhere_is_said_before_anything_runs(
    data: Path, key: str, value: Any, expected: str
) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        made(values_for(data), **{f"stages__{key}": value})
    assert "\n" not in str(caught.value)


def test_a_stage_changes_a_named_config_and_takes_what_all_share(data: Path) -> None:
    config = made(values_for(data))
    stage = config.stages["pretrain"]
    shipped = configs.load("pretrain-tiny")
    assert stage["corpus"][0]["path"] == str(data / "stories.txt")
    assert stage["corpus"][0]["limit"] == 20000  # the shipped one's
    assert stage["training"]["warmup"] == shipped.to_dict()["training"]["warmup"] > 0
    assert (stage["name"], stage["device"], stage["threads"]) == ("pretrain", "cpu", 1)
    own = values_for(data)
    own["stages"]["sft"]["device"] = "auto"
    assert made(own).stages["sft"]["device"] == "auto"
    assert made(own).stages["sft"]["dtype"] == "float32"
    assert configs.parse(config.to_dict(), "config.yaml").digest() == config.digest()


def test_merging_changes_neither_side() -> None:
    base = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": [1, 2]}
    change = {"a": {"c": {"1": {"d": 3}}}, "e": [9]}
    before = copy.deepcopy((base, change))
    assert merged(base, change) == {"a": {"b": 1, "c": [1, {"d": 3}]}, "e": [9]}
    assert (base, change) == before


def test_a_digest_covers_config_outputs_and_data(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sst2"
    shutil.copytree(data / "sst2", folder)
    values = values_for(data, ("pretrain", "sft"))
    values["inputs"]["sst2"] = str(folder)

    def digest(of: dict[str, Any] = values, outputs: dict[str, str] | None = None) -> str:
        return stage_digest(made(of).parsed()["sft"], outputs or {"stages.pretrain.model": "1"})

    first = digest()
    assert digest() == first
    (tmp_path / "else.txt").write_text("x")
    assert digest() == first
    assert digest(outputs={"stages.pretrain.model": "2"}) != first
    changed = copy.deepcopy(values)
    changed["stages"]["sft"]["seed"] = 5
    assert digest(changed) != first
    (folder / "test.tsv").write_text((folder / "test.tsv").read_text() + "more\t1\n")
    second = digest()
    assert second != first
    (folder / "test.tsv").rename(folder / "test2.tsv")
    assert digest() not in (first, second)


def test_a_teachers_rows_can_be_learned_and_are_not_asked_for_in_a_plan(data: Path) -> None:
    values = values_for(data, ("pretrain", "sft"))
    sft = values["stages"].pop("sft")
    task = sft.pop("task")
    teach = {"kind": "distill", "model": "stages.pretrain.model", "task": task, "samples": 2}
    values["stages"] |= {"teach": teach, "sft": {**sft, "data": {"path": "stages.teach.data"}}}
    lines = plan(made(values))
    assert lines[-1] == "stage sft: sft, reads stages.pretrain.model, stages.teach.data"
    values["inputs"]["sst2"] = "nowhere/at/all"
    with pytest.raises(UserError, match=r"^stage teach: .*nowhere/at/all"):
        plan(made(values))


def test_a_plan_runs_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = plan(made(values_for(data)))
    assert lines[0] == "stage pretrain: pretrain"
    assert "stage dpo: dpo, reads stages.sft.model" in lines
    assert "  task sst2: 12 training and 5 test examples" in lines
    assert not list(tmp_path.iterdir())
