"""Pipelines that are killed, signalled, moved, or stopped by an error."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loralab import pipeline
from loralab.cli import main
from loralab.durable import read_lines
from loralab.errors import UserError
from loralab.gradient.events import StepDone, TrainingEnded
from loralab.report import build_report
from loralab.run import Run
from tiny_stages import go, made, values_for, write_data


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


STAGES = ("pretrain", "sft")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stages") / "run"
    _, result, _ = go(made(values_for(data, STAGES)), path)
    assert result.ran == STAGES
    return path


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the stages' own pages, which take longer than such small stages."""

    def build(path: Path) -> Path:
        return build_report(path) if Run.open(path).config["kind"] == "pipeline" else path

    monkeypatch.setattr(pipeline, "build_report", build)


def test_a_killed_stage_goes_on_where_it_was(
    finished: Path, plain: None, data: Path, tmp_path: Path
) -> None:
    config, path = made(values_for(data, STAGES)), tmp_path / "run"
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
        assert main(["run", str(file)]) == 0  # what SIGTERM asks for; SIGINT's is 130
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


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_at_a_stages_last_moment_stops_the_pipeline_too(
    plain: None, data: Path, tmp_path: Path, times: int
) -> None:
    config, path = made(values_for(data, ("pretrain", "sft"))), tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)

    def stop(event: Any) -> None:
        if isinstance(event, TrainingEnded):  # after its last evaluation
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)

    if times == 1:
        _, result, _ = go(config, path, stop)
        assert (result.complete, result.ran) == (False, ("pretrain",))
    else:
        with pytest.raises(KeyboardInterrupt):
            go(config, path, stop)
    assert not (path / "sft").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    _, result, _ = go(config, path)
    assert result.complete
    assert (path / "sft" / "adapter").exists()


def test_a_pipeline_that_is_moved_keeps_what_is_done_and_says_what_is_not(
    finished: Path, plain: None, data: Path, tmp_path: Path
) -> None:
    config, moved = made(values_for(data, STAGES)), tmp_path / "moved"
    shutil.copytree(finished, moved)
    _, result, _ = go(config, moved)
    assert (result.ran, result.skipped) == ((), STAGES)
    lines = (moved / "journal.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "finished"
    (moved / "journal.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match=r"^stage sft: was begun with stages.pretrain.model at .*"):
        go(config, moved)
    shutil.rmtree(moved / "sft")
    _, result, _ = go(config, moved)
    assert (result.ran, result.skipped) == (("sft",), ("pretrain",))
