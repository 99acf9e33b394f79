"""Pipelines: every kind through, what is skipped, and what is run again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loralab import pipeline
from loralab.durable import read_lines
from loralab.errors import UserError
from loralab.report import build_report
from loralab.report.stages import read_table
from loralab.run import Run
from tiny_stages import ALL, contents, go, made, values_for, write_data


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def plain(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the stages' own pages, which take longer than such small stages."""

    def build(path: Path) -> Path:
        return build_report(path) if Run.open(path).config["kind"] == "pipeline" else path

    monkeypatch.setattr(pipeline, "build_report", build)


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


def test_a_pipeline_does_not_go_on_in_another_runs_directory(finished: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"holds a run of kind 'sft', no pipeline"):
        go(made(values_for(data)), finished / "sft")
