"""Real kills of a real process: whatever the moment, the run ends in the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loralab.evolution.journal import read
from loralab.run import Run

SCRIPT = Path(__file__).with_name("killed_run.py")


def run(path: Path, kills: int, seed: int, name: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, SCRIPT, path, str(kills), str(seed), name],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "undisturbed"
    run(path, 0, 0, "SIGKILL")
    return path


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("SIGKILL", 1),
        pytest.param("SIGKILL", 2, marks=pytest.mark.slow),
        ("SIGTERM", 3),
    ],
)
def test_a_killed_run_ends_in_the_same_bits(
    tmp_path: Path, undisturbed: Path, name: str, seed: int
) -> None:
    path = tmp_path / "run"
    lines = run(path, 8, seed, name)
    reached = [int(line.split(" with ")[1].split()[0]) for line in lines]
    assert reached == sorted(reached)
    if name == "SIGKILL":
        assert sum("signal 9" in line for line in lines) >= 4, lines
    else:  # a child told to stop while it is still loading may not have a handler yet
        assert sum("ended by 3" in line for line in lines) >= 2, lines

    assert (path / "journal.jsonl").read_bytes() == (undisturbed / "journal.jsonl").read_bytes()
    for name in ("adapter", "checkpoints/final"):
        for file in (undisturbed / name).iterdir():
            assert (path / name / file.name).read_bytes() == file.read_bytes()
    assert len(read(path / "journal.jsonl").entries) == 60
    rows = Run.open(path).metrics()
    assert [row["generation"] for row in rows] == list(range(61))
    expected = Run.open(undisturbed).metrics()
    for row, other in zip(rows, expected, strict=True):
        for key in ("reward_mean", "held_out_reward", "best_generation", "update_rms"):
            assert row.get(key) == other.get(key)
