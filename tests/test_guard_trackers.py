"""What a guard sees reaches the trackers that a training reports to.

TensorBoard is written and read for true where it is installed; of Weights & Biases and Trackio,
whose interfaces are one, a stand-in keeps what it is given.
"""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import TrainerCallback

from loralab.health import GuardCallback, guard_view
from loralab.health.findings import Example, Finding
from loralab.health.telling import as_markdown, lines
from watched_training import PROMPTS, adapted, trainer


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_view, "TOKENS", 5)


def broken() -> Any:
    """An adapter that changes the model before its first step."""
    model = adapted(init_lora_weights=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data *= 10
    return model


def test_tensorboard_shows_numbers_texts_and_findings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    guard = GuardCallback(PROMPTS)
    made = trainer(tmp_path, broken(), guard, steps=6, report_to="tensorboard")
    made.train()
    (run,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    theirs, ours = EventAccumulator(str(run)), EventAccumulator(str(run / "guard"))
    theirs.Reload()
    ours.Reload()
    assert "train/loss" in theirs.Tags()["scalars"], "the guard's own folder lies in the run's"
    looks = [one.step for one in guard.readings]
    assert looks == [0, 1, 5, 6]
    kl = ours.Scalars("guard/kl")
    assert [event.step for event in kl] == looks
    assert [event.value for event in kl] == pytest.approx([r.values["kl"] for r in guard.readings])
    assert ours.Scalars("guard/findings.fail")[0].value > 0
    assert not any("base." in tag for tag in ours.Tags()["scalars"])
    texts = ours.Tensors("guard/texts/text_summary")
    assert [event.step for event in texts] == looks
    for event, reading in zip(texts, guard.readings, strict=True):
        shown = event.tensor_proto.string_val[0].decode()
        for example in reading.examples:
            assert f"    {example.prompt}" in shown
            assert f"    {example.completion}" in shown
    found = ours.Tensors("guard/findings/text_summary")
    told = "".join(event.tensor_proto.string_val[0].decode() for event in found)
    assert guard.findings
    for finding in guard.findings:
        assert finding.message in told
        assert finding.advice in told


def test_tensorboard_is_written_where_its_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    guard = GuardCallback(PROMPTS, texts=False)
    trainer(tmp_path / "run", adapted(), guard, steps=1, report_to="tensorboard").train()
    assert list((tmp_path / "elsewhere" / "guard").glob("events*"))


class Level(enum.Enum):
    WARN = "warn"
    ERROR = "error"


class StandIn(ModuleType):
    """A tracker with the interface that both have: log, Table, alert, AlertLevel, finish."""

    AlertLevel = Level

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.rows: list[dict[str, Any]] = []
        self.alerts: list[tuple[str, str, Level]] = []
        self.running = True

    def log(self, metrics: dict[str, Any]) -> None:
        if not self.running:
            raise RuntimeError("Call init() before log().")
        self.rows.append(metrics)

    def Table(self, columns: list[str], data: list[list[Any]]) -> Any:
        assert all(len(row) == len(columns) for row in data)
        return {"columns": columns, "data": data}

    def alert(self, title: str, text: str, level: Level) -> None:
        self.alerts.append((title, text, level))


class Finisher(TrainerCallback):  # type: ignore[misc]
    """Ends the tracker's run as its own callback does, before the guard's turn."""

    def __init__(self, package: StandIn) -> None:
        self._package = package

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._package.running = False


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_dashboard_gets_tables_that_grow_and_alerts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = StandIn(name)
    monkeypatch.setitem(sys.modules, name, package)
    told: list[str] = []
    guard = GuardCallback(PROMPTS, tell=told.append)
    made = trainer(tmp_path, broken(), guard, steps=6)
    made.args.report_to = [name]
    made.callback_handler.callbacks.insert(0, Finisher(package))
    made.train()
    assert not any("told no more" in line for line in told)
    numbers = [row for row in package.rows if "guard/kl" in row]
    assert [row["train/global_step"] for row in numbers] == [0, 1, 5, 6]
    assert [row["guard/kl"] for row in numbers] == [one.values["kl"] for one in guard.readings]
    texts = numbers[-1]["guard/texts"]
    assert texts["columns"] == ["step", "prompt", "writes", "base"]
    assert [row[0] for row in texts["data"]] == sorted(row[0] for row in texts["data"])
    shown = [
        [one.step, e.prompt, e.completion, e.base] for one in guard.readings for e in one.examples
    ]
    assert texts["data"] == shown
    assert len(numbers[0]["guard/texts"]["data"]) == len(guard.readings[0].examples)
    found = [row["guard/findings"] for row in package.rows if "guard/findings" in row]
    assert [row[2] for row in found[-1]["data"]] == [one.rule for one in guard.findings]
    levels = [level for _, _, level in package.alerts]
    assert [level is Level.ERROR for level in levels] == [
        one.severity == "fail" for one in guard.findings
    ]
    assert "init.garbled fails" in [title for title, _, _ in package.alerts]


def test_a_tracker_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = StandIn("wandb")
    package.running = False
    monkeypatch.setitem(sys.modules, "wandb", package)
    told: list[str] = []
    guard = GuardCallback(PROMPTS, texts=False, tell=told.append)
    made = trainer(tmp_path, adapted(), guard, steps=5)
    made.args.report_to = ["wandb", "mlflow"]
    made.train()
    assert made.state.global_step == 5
    said = [line for line in told if "told no more" in line]
    assert said == ["guard: wandb is told no more: RuntimeError: Call init() before log()."]


def test_a_finding_in_words_shows_its_line_breaks() -> None:
    example = Example("Count.", "1\n\n\n\n2", "1 2 3")
    found = Finding("text.newlines", "fail", 25, "m 0.9", {}, "data.newlines", (), "a", (example,))
    first, why, *shown = lines(found)
    assert first == "FAIL step 25 text.newlines: m 0.9"
    assert why == "     likely data.newlines: a"
    assert shown == [
        "     asked 'Count.'",
        r"     it writes '1\n\n\n\n2'",
        "     its base  '1 2 3'",
    ]
    assert "    1\n\n\n\n    2" in as_markdown(found)
    warned = Finding("text.newlines", "warn", 25, "m 0.4", {}, "data.newlines", (), "a", (example,))
    assert list(lines(warned)) == ["warn step 25 text.newlines: m 0.4"]
