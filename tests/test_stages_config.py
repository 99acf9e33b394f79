"""A pipeline before it runs: references that lead nowhere, digests, plans."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from loralab import config as configs
from loralab.config.pipeline import merged
from loralab.errors import UserError
from loralab.planning import plan
from loralab.stages.digest import stage_digest
from tiny_stages import made, values_for, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


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


@pytest.mark.parametrize(("init", "key"), [("pissa", "reference"), ("warm_start", "teacher")])
def test_a_digest_covers_a_model_without_a_slash(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    values = values_for(data, ("pretrain", "sft"))
    values["stages"]["sft"]["adapter"]["init"] = {
        "name": init, "options": {key: "whole"}
    }  # fmt: skip
    stage = made(values).parsed()["sft"]
    none = stage_digest(stage, {})
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model.safetensors").write_text("weights")
    first = stage_digest(stage, {})
    (tmp_path / "whole" / "model.safetensors").write_text("others")
    assert len({none, first, stage_digest(stage, {})}) == 3
    values["stages"]["sft"]["adapter"]["init"]["options"][key] = "stages.pretrain.model"
    assert made(values).stages["sft"]["adapter"]["init"]["options"]
    values["stages"]["sft"]["adapter"]["init"]["options"][key] = "stages.pretrain.adapter"
    with pytest.raises(UserError, match=r"stage pretrain leaves model"):
        made(values)
