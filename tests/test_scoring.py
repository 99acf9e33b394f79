"""Scores in worker processes: those of this process to the bit, whatever a reward does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab import tasks
from loralab.bench.resilience.task import FAULTS, NEEDS_A_DEADLINE, Faulty, installed
from loralab.engines.base import Completion
from loralab.errors import UserError
from loralab.rollouts import Batch, Rollout, refuse_failures
from loralab.scoring import LARGEST_REWARD, Scorer, pool, process, scored
from loralab.tasks.base import Example, Score, Split

TEXTS = [f"text {number} " + "x" * number for number in range(40)] + [
    "",
    "é\ud800\n",
    "y" * 300_000,
]
SPLITS: tuple[Split, ...] = ("train", "test")


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed(tmp_path / "site")))


def items(task: Any) -> list[tuple[Split, Example, str]]:
    return [
        (split, example, text)
        for split in SPLITS
        for example in task.examples(split)[:2]
        for text in TEXTS
    ]


def asked(task: Any) -> list[Any]:
    return [(split, example.id, text) for split, example, text in items(task)]


def test_they_are_those_of_this_process_in_order() -> None:
    task = tasks.get("conciseness")
    here = [scored(task, example, text) for _, example, text in items(task)]
    with Scorer("conciseness", {}, deadline=60, workers=2) as scorer:
        assert scorer.score(asked(task)) == here
        assert scorer.score([]) == []
        example = task.examples("test")[1]
        assert scorer.one("test", example, "Au") == task.score(example, "Au")
        assert scorer.empty("test", example) == task.score(example, "")
        assert len(scorer._processes) == 2
        repeated = scorer.score(asked(task))
    assert repr(repeated) == repr(here)  # ints stay ints, and -0.0 itself


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_own_completion_alone(fault: Any) -> None:
    share = 0.05 if fault in NEEDS_A_DEADLINE else 0.1  # each of those costs a process
    task = Faulty(fault, share)
    wanted = items(task)
    assert 2 < sum(task.unlucky(text) for _, _, text in wanted) < 40
    deadline = 2.0 if "hangs" in fault else 60.0
    with Scorer("faulty", {"fault": fault, "share": share}, deadline, workers=2) as scorer:
        found = scorer.score([(split, example.id, text) for split, example, text in wanted])
    told = {
        "raises": "task faulty: KeyError: 'answer'",
        "exits": "task faulty: SystemExit: 3",
        "nan": "task faulty: reward is nan",
        "string": "task faulty: TypeError: must be real number, not str",
        "huge": f"task faulty: reward is 1e+308; beyond {LARGEST_REWARD:g} it is none",
        "hangs": "task faulty: took longer than 2 s",
        "hangs_in_c": "task faulty: took longer than 2 s",
        "dies": "task faulty: its process ended by signal 9",
    }
    for (_, example, text), score in zip(wanted, found, strict=True):
        if task.unlucky(text):
            assert score == told[fault]
            if fault not in NEEDS_A_DEADLINE:
                assert score == scored(task, example, text)
        else:
            assert score == tasks.get("conciseness").score(example, text)


def test_a_worker_killed_from_outside_costs_nothing() -> None:
    task = tasks.get("conciseness")
    with Scorer("conciseness", {}, deadline=60, workers=1) as scorer:
        before = scorer.score(asked(task))
        for _ in range(3):
            os.killpg(scorer._processes[0]._process.pid, signal.SIGKILL)
            assert scorer.score(asked(task)) == before


class Gives(Faulty):
    def __init__(self, given: Any) -> None:
        super().__init__("raises")
        self.given = given

    def score(self, example: Example, completion: str) -> Score:
        score: Score = self.given
        return score


def test_what_a_reward_may_return() -> None:
    example = Example("0", {})
    for given, plain in (
        (Score(np.float32(0.1), np.bool_(True)), Score(float(np.float32(0.1)), True)),
        (Score(True), Score(1.0)),
        (Score(-3), Score(-3)),
        (Score(LARGEST_REWARD), Score(LARGEST_REWARD)),
    ):
        found = scored(Gives(given), example, "x")
        assert found == plain
        assert isinstance(found, Score)
        assert type(found.reward) in (int, float)
        assert found.correct is None or type(found.correct) is bool
    for given, why in (
        (None, "'NoneType' object has no attribute 'reward'"),
        (Score("1"), "must be real number"),  # type: ignore[arg-type]
        (Score(10**400), "int too large"),
        (Score(-2 * LARGEST_REWARD), "beyond 1e+15 it is none"),
        (Score(float("inf")), "reward is inf"),
        (Score(0.0, None, [1]), "parts are a list"),  # type: ignore[arg-type]
    ):
        assert why in str(scored(Gives(given), example, "x"))


def test_a_task_that_cannot_be_made_is_one_line() -> None:
    with (
        Scorer("conciseness", {"path": "/nowhere.jsonl"}, deadline=60) as scorer,
        pytest.raises(UserError, match=r"in the process that scores: .*nowhere"),
    ):
        scorer.score([("train", "train-0", "x")])


def test_one_that_ends_or_sleeps_at_its_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, limit, how in (
        ("import sys; sys.exit(7)", 100, "ended by exit code 7 at start"),
        ("import time; time.sleep(1e6)", 0.5, "took longer than 0.5 s at start"),
    ):
        monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", code))
        monkeypatch.setattr(pool, "LONGEST_START", limit)
        scorer = Scorer("conciseness", {}, deadline=60)
        with pytest.raises(UserError, match=how):
            scorer.score([("train", "train-0", "x")])
        assert scorer._processes == []


def test_one_killed_at_its_start_is_started_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    killed = (
        "import os, sys, pathlib, runpy; at = pathlib.Path(sys.argv[1]);"
        "lives = at.read_text() if at.exists() else ''; at.write_text(lives + 'x');"
        "len(lives) < 2 and os.kill(os.getpid(), 9); sys.argv[1:] = [];"
        "runpy.run_module('loralab.scoring.worker', run_name='__main__')"
    )
    command = (sys.executable, "-c", killed, str(tmp_path / "lives"))
    monkeypatch.setattr(process, "COMMAND", command)
    task = tasks.get("conciseness")
    with Scorer("conciseness", {}, deadline=60, workers=1) as scorer:
        found = scorer.score(asked(task))
    assert all(isinstance(score, Score) for score in found)
    assert (tmp_path / "lives").read_text() == "xxx"
    always = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(process, "COMMAND", always)
    with pytest.raises(UserError, match="ended by signal 9 at start"):
        Scorer("conciseness", {}, deadline=60, workers=1).score(asked(task))


DRIVER = """
import sys
from loralab.scoring import Scorer
scorer = Scorer("faulty", {"fault": "hangs_in_c", "share": 1.0}, deadline=float(sys.argv[1]))
scorer._staff(1)
print(scorer._processes[0]._process.pid, flush=True)
scorer.score([("train", "train-0", "x")])
"""


def test_a_worker_that_hangs_in_c_does_not_outlive_its_driver(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "1"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert driver.stdout is not None
    worker = int(driver.stdout.readline())
    time.sleep(2)  # by now it hangs, or it still starts: either must end
    driver.kill()
    driver.wait()
    until = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # ended, and whoever is process 1 here has not taken note
            break
        time.sleep(0.2)
    else:
        assert not Path(f"/proc/{worker}").exists()


def batch(task: Any, scorer: Scorer | None) -> Batch:
    from loralab.config import GenerationConfig

    return Batch(task, "test", tuple(task.examples("test")), GenerationConfig(), "k", scorer)


def answers(members: int) -> list[Completion]:
    made = [Completion(f"answer {n}" + "z" * n, (n,), "stop") for n in range(8 * members)]
    made[3] = Completion("", (), "error", "no room")
    return made


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_batch_judges_several_members_at_once_the_same_way(fault: Any) -> None:
    task = Faulty(fault, share=0.3)
    with Scorer("faulty", {"fault": fault, "share": 0.3}, deadline=60) as scorer:
        there = batch(task, scorer).judge(answers(3))
    here = batch(task, None).judge(answers(3))
    assert there == here
    assert [rollout.example for rollout in here] == list(task.examples("test")) * 3
    assert here[3].failed == "no room"
    empty = task.score(task.examples("test")[3], "")
    assert here[3].score == Score(task.reward_floor, False, empty.parts)
    failed = [rollout for rollout in here if rollout.failed]
    assert 2 < len(failed) < 20
    assert {rollout.score.reward for rollout in failed} == {task.reward_floor}
    with pytest.raises(ValueError, match="longer"):
        batch(task, None).judge(answers(3)[:-1])


def test_a_share_of_failures_stops_a_run() -> None:
    task = Faulty("raises", share=0.3)
    rollouts: list[Rollout] = batch(task, None).judge(answers(3))
    failed = sum(rollout.failed is not None for rollout in rollouts)
    refuse_failures(rollouts, failed / len(rollouts), "generation 4")
    refuse_failures([], 0.0, "generation 4")
    with pytest.raises(
        UserError, match=rf"generation 4: {failed} of 24 .*the first: no room.*--res"
    ):
        refuse_failures(rollouts, (failed - 1) / len(rollouts), "generation 4")
