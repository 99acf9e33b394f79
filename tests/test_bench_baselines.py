"""The table of baselines: every task is in it, a line is what its command measures, none twice."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from loralab import cli
from loralab.bench import baselines
from loralab.registry import TASKS
from loralab.run import Run
from loralab.tasks.choice import NAMES


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_every_task_is_in_the_table() -> None:
    found = baselines.lines()
    assert {line.task for line in found} == set(TASKS.builtin) - {"supervised"}
    assert [line.options["dataset"] for line in found if line.task == "choice"] == list(NAMES)
    for line in found:
        assert line.shots[0] in (0, None), "zero-shot comes first"
        assert (len(line.shots) > 1) == (line.task not in ("humaneval", "text"))


def test_a_line_is_what_its_command_measures_and_is_not_measured_twice(
    model: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    (data / "wikitext-2").mkdir(parents=True)
    (data / "wikitext-2" / "test.txt").write_text(tiny.words(300, 1))
    made = [line for line in baselines.lines() if line.task in ("conciseness", "text")]
    several = replace(made[0], shots=(0,), samples=2, shown=("pass@1", "pass@2"), tokens=4)
    made = [replace(made[0], tokens=4), several, *made[1:]]
    monkeypatch.setattr(baselines, "lines", lambda: made)
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(data), "--model", "model", "--limit", "40", "--out", "page.md"]
    assert cli.main(["bench", "baselines", *words]) == 0
    capsys.readouterr()
    page = Path("page.md").read_text()
    assert str(data) not in page, "no path of this machine"
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith(("| conciseness", "| text"))
    ]
    assert [row[:4] for row in rows] == [
        ["conciseness", "0", "reward", "8"],
        ["conciseness", "0", "correct", "8"],
        ["conciseness", "2", "reward", "8"],
        ["conciseness", "2", "correct", "8"],
        ["conciseness", "0", "pass@1", "8 x 2"],
        ["conciseness", "0", "pass@2", "8 x 2"],
        ["text", "-", "perplexity", "39"],
    ]
    for row in (rows[2], rows[4]):
        command = shlex.split(row[5].strip("`").replace("DATA", str(data)))
        assert cli.main(command[1:]) == 0
        table = capsys.readouterr().out.splitlines()
        [measured] = [line for line in table if f"  {row[2]} " in line]
        score, error = row[4].split(" ± ")
        shown = measured.replace("−", "-").split()
        assert float(shown[shown.index("±") - 1]) == pytest.approx(float(score), rel=0.01)
        assert float(shown[shown.index("±") + 1]) == pytest.approx(float(error), rel=0.05)

    # Later, elsewhere: what is there is told with where and when it was measured.
    monkeypatch.setattr(baselines, "evaluate_into", None)
    monkeypatch.setattr(baselines, "text_likelihood", None)
    monkeypatch.setattr("loralab.bench.command.machine", lambda: "another machine")
    monkeypatch.setattr("loralab.bench.command.date", None)
    assert cli.main(["bench", "baselines", *words]) == 0
    assert Path("page.md").read_text() == page


@pytest.mark.parametrize("change", ["data", "device", "version", "model"])
def test_another_setting_is_another_measurement(
    change: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [line] = [line for line in baselines.lines() if line.task == "text"]
    monkeypatch.setattr(baselines, "lines", lambda: [line])
    for name, seed in (("data", 1), ("other", 2)):
        (tmp_path / name / "wikitext-2").mkdir(parents=True)
        (tmp_path / name / "wikitext-2" / "test.txt").write_text(tiny.words(60, seed))
    options = baselines.Options(data=tmp_path / "data", model=model, runs=tmp_path / "runs")
    first = baselines.run(options)
    if change == "version":
        monkeypatch.setattr(baselines, "versions", lambda *_: {"torch": "99"})
        monkeypatch.setattr("loralab.bench.command.versions", lambda *_: {"torch": "99"})
    else:
        copy = tmp_path / "other-model"
        shutil.copytree(model, copy)
        values = {"data": tmp_path / "other", "device": "cpu", "model": str(copy)}
        options = replace(options, **{change: values[change]})
    second = baselines.run(options)
    assert len(list((tmp_path / "runs").iterdir())) == 2
    scores = [table.data["lines"][0]["scores"] for table in (first, second)]
    assert (scores[0] != scores[1]) == (change == "data")
    assert (second.facts["versions"] == "torch 99") == (change == "version")


def test_a_line_that_was_cut_short_is_measured_anew(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = replace(baselines.lines()[2], tokens=2, shots=(0,))
    monkeypatch.setattr(baselines, "lines", lambda: [line])
    options = baselines.Options(data=tmp_path, model=model, runs=tmp_path / "runs", limit=2)
    baselines.run(options)
    [path] = (tmp_path / "runs").iterdir()
    assert path.name.startswith("conciseness-0-")
    whole = Run.open(path).completions()
    (path / "metrics.jsonl").unlink()
    baselines.run(options)
    assert Run.open(path).completions() == whole
    assert len(Run.open(path).metrics()) == 1


def test_what_is_wrong_is_said(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["bench", "baselines", "--data", str(tmp_path), "--only", "nope"]) == 2
    assert "--only nope" in capsys.readouterr().err
