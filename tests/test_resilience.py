"""Whole runs of the command line, disturbed once in each way that the benchmark repeats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from loralab.bench.resilience import command, disk, rewards
from loralab.bench.resilience.child import Launcher
from loralab.bench.resilience.damage import DAMAGES, damages
from loralab.bench.resilience.kills import Driver, ScoringWorker, Subject, kills
from loralab.bench.resilience.rows import Row
from loralab.bench.resilience.signals import (
    clock_jumps,
    terminated,
    terminated_twice,
    two_processes,
)
from loralab.bench.resilience.task import installed
from loralab.bench.resilience.world import SLOW, Scene, save_model


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    folder = tmp_path_factory.mktemp("resilience")
    save_model(folder)
    with Launcher(folder, {"PYTHONPATH": str(installed(folder / "site"))}) as made:
        yield made


@pytest.fixture(scope="module")
def plain(launcher: Launcher) -> Scene:
    return Scene.of(launcher.folder, launcher)


@pytest.fixture(scope="module")
def slow(launcher: Launcher) -> Scene:
    return Scene.of(launcher.folder, launcher, "slow", **SLOW)


def survives(row: Row) -> None:
    for trial in row.trials:
        assert trial.wrong is None
        assert trial.survived
        assert trial.identical in (True, None)


def fails(line: str) -> None:
    pytest.fail(line)


def test_a_killed_driver_is_resumed_to_the_same_bytes(plain: Scene) -> None:
    row = kills(Driver(), plain, 2, Random(1), fails)
    survives(row)
    assert "kills: " in row.case


def test_a_killed_scoring_process_is_replaced(launcher: Launcher) -> None:
    subject: Subject = ScoringWorker()
    scene = Scene.of(launcher.folder, launcher, subject.name, **subject.changes)
    survives(kills(subject, scene, 1, Random(2), fails))


@pytest.mark.parametrize("damage", DAMAGES[:2], ids=lambda damage: damage.label)
def test_damage_is_said_and_mended(plain: Scene, damage: Any) -> None:
    row = damages(damage, plain, 1, Random(3), fails)
    survives(row)
    assert damage.mark in row.trials[0].said


def test_the_harness_sees_what_is_lost(plain: Scene) -> None:
    path = plain.new()
    plain.start(path).ended()
    assert plain.difference(path) is None
    assert plain.kept(path)
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl", "journal.jsonl"):
        before = (path / name).read_bytes()
        (path / name).write_bytes(before[:-200])
        assert plain.difference(path) is not None
        (path / name).write_bytes(before)
    lines = (path / "completions.jsonl").read_bytes().splitlines(True)
    for wrong in (lines[:-1], [*lines, lines[-1]]):
        (path / "completions.jsonl").write_bytes(b"".join(wrong))
        assert plain.difference(path) == "completions.jsonl has other lines"
    (path / "completions.jsonl").write_bytes(b"".join(lines))
    assert plain.difference(path) is None
    plain.start(path).ended()  # which is resumed, and at its end
    assert plain.difference(path) is None
    (path / "journal.jsonl").write_bytes(b"x" + before[1:])
    assert not plain.kept(path)


def test_one_refused_call_and_one_small_disk_are_one_line_each(plain: Scene) -> None:
    said: list[str] = []
    row = disk.refusals(plain, 1, said.append)
    assert said == []
    survives(row)
    trial = disk._in_small_files(plain, 8192)
    assert trial is not None
    survives(Row("files", [trial]))
    assert "File too large" in trial.said
    if os.geteuid() == 0 and disk._can_mount(plain.folder):
        trial = disk._on_disk(plain, 48 * 1024)
        assert trial is not None
        survives(Row("disk", [trial]))
        assert "no space left on disk while writing FILE" in trial.said


@pytest.mark.parametrize("case", [terminated, terminated_twice])
def test_signals(slow: Scene, case: Any) -> None:
    survives(case(slow, 1, Random(4), fails))


@pytest.mark.parametrize("case", [two_processes, clock_jumps])
def test_company_and_clocks(plain: Scene, case: Any) -> None:
    survives(case(plain, 1, Random(5), fails))


@pytest.mark.parametrize("fault", ["raises", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_misbehaving_reward_is_counted_and_the_run_goes_on(
    launcher: Launcher, fault: Any
) -> None:
    trial = rewards._goes_on(launcher.folder, launcher, fault, 0, fails)
    survives(Row("reward", [trial]))
    assert "task faulty" in trial.said


def test_too_many_failures_stop_a_run(launcher: Launcher) -> None:
    trial = rewards._stops(launcher.folder, launcher, 0, fails)
    survives(Row("reward", [trial]))
    assert "scoring.max_failed 0 allows; the first: task faulty: KeyError" in trial.said


def test_cases_that_are_not_run_again_keep_what_they_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralab.bench.resilience.rows import Trial

    def one(said: str) -> Any:
        return lambda world: iter(
            [Row("a case", [Trial(True, True, said), Trial(False, None, "")])]
        )

    class Nothing:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(command, "Launcher", Nothing)
    monkeypatch.setattr(command, "CASES", {"kills": ("K", one("old")), "disk": ("D", one("d"))})
    page = tmp_path / "page.md"
    command.run(command.Options(), lambda _: None, page).write(page)
    assert "| a case | 2 | 1 / 2 | 1 / 1 | `old` |" in page.read_text()
    assert "- survived: 2 of 4 trials" in page.read_text()
    monkeypatch.setattr(command, "CASES", {"kills": ("K", one("new")), "disk": ("D", one("e"))})
    command.run(command.Options(only=("kills",)), lambda _: None, page).write(page)
    text = page.read_text()
    assert "`new`" in text
    assert "`d`" in text
    assert "`old`" not in text
