"""Timings add up, nest, survive an exception and go on after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from loralab.errors import UserError
from loralab.timings import Timings


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_inner_phases_take_their_time_from_the_outer_one() -> None:
    clock = Clock()
    timings = Timings(clock)
    with timings.phase("total_experiment"):
        clock.now += 1
        with timings.phase("weight_analysis"):
            clock.now += 2
        for _ in range(3):
            with timings.phase("evaluation"):
                clock.now += 4
                with timings.phase("loading"):
                    clock.now += 0.5
                clock.now += 1
    assert timings.to_dict() == {
        "weight_analysis": {"seconds": 2.0, "calls": 1},
        "loading": {"seconds": 1.5, "calls": 3},
        "evaluation": {"seconds": 15.0, "calls": 3},
        "total_experiment": {"seconds": 19.5, "calls": 1},
    }
    rows = timings.table()
    assert [(row.name, row.seconds, row.calls) for row in rows] == [
        ("total_experiment", 19.5, 1),
        ("evaluation", 15.0, 3),
        ("weight_analysis", 2.0, 1),
        ("loading", 1.5, 3),
        ("other", 1.0, 0),
    ]
    assert rows[1].percent == pytest.approx(100 * 15 / 19.5)
    assert sum(row.percent for row in rows[1:]) == pytest.approx(100)


def test_a_running_phase_counts_up_to_now() -> None:
    clock = Clock()
    timings = Timings(clock)
    with timings.phase("total_experiment"):
        clock.now += 1
        with timings.phase("evaluation"):
            clock.now += 2
            with timings.phase("loading"):
                with timings.phase("create_loras"):
                    clock.now += 16
                clock.now += 4
                with timings.phase("unloading"):
                    clock.now += 8
                    seconds = {name: entry["seconds"] for name, entry in timings.to_dict().items()}
    assert seconds == {
        "total_experiment": 31, "evaluation": 2, "loading": 4, "create_loras": 16, "unloading": 8,
    }  # fmt: skip
    assert {name: e["seconds"] for name, e in timings.to_dict().items()} == seconds


def test_saved_timings_go_on(tmp_path: Path) -> None:
    path, clock = tmp_path / "timings.json", Clock()
    assert Timings.load(path).to_dict() == {}
    timings = Timings(clock)
    with timings.phase("total_experiment"):
        with timings.phase("evaluation"):
            clock.now += 3
        timings.save(path)  # as a trainer does after each generation
        clock.now += 50  # lost to kill -9
    again = Timings.load(path)
    again._clock = clock
    with again.phase("total_experiment"), again.phase("evaluation"):
        clock.now += 4
    assert again.to_dict()["evaluation"] == {"seconds": 7.0, "calls": 2}
    assert again.seconds("total_experiment") == 7.0


def test_a_phase_that_raises_is_counted_and_not_left_open() -> None:
    clock = Clock()
    timings = Timings(clock)
    for _ in range(2):
        with pytest.raises(KeyError), timings.phase("evaluation"):  # noqa: PT012
            clock.now += 1
            raise KeyError
    assert timings.to_dict() == {"evaluation": {"seconds": 2.0, "calls": 2}}
    with timings.phase("a"), pytest.raises(RuntimeError, match="already"), timings.phase("a"):
        pass


def test_a_foreign_file_is_one_line(tmp_path: Path) -> None:
    for content in ("[1]", "{", '{"evaluation": 3}'):
        (tmp_path / "timings.json").write_text(content)
        with pytest.raises(UserError, match="not a file of timings"):
            Timings.load(tmp_path / "timings.json")


def test_the_timings_of_a_run_are_saved_also_when_it_raises(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"

    def broken() -> None:
        with Timings.of_run(path) as timings, timings.phase("evaluation"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    with Timings.of_run(path):
        pass
    kept = Timings.load(path).to_dict()
    assert kept["total_experiment"]["calls"] == 2
    assert kept["evaluation"]["calls"] == 1
