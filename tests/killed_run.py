"""Run a search in children that are killed: `python killed_run.py RUN_DIR KILLS SEED SIGNAL`.

This process imports everything once and forks; each child runs or resumes the search and gets the
signal after a random time. The last child is left to finish. Prints one line a child.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fake_engine import FakeEngine, make_config, workbench
from loralab.evolution.trainer import evolve
from loralab.run import Run

GENERATIONS = 60
SECONDS = 0.05
"""Of a generation: 60 of them outlast four kills, each after 0.6 s at most, on any machine."""


def run_once(path: Path) -> None:
    config = make_config(generations=GENERATIONS, eval_every=7, optimizer={"name": "momentum"})
    fresh = not (path / "config.yaml").exists()
    values = config.to_dict()
    with Run.create(path, values) if fresh else Run.resume(path, values) as run:
        result = evolve(
            config, run, open_workbench=lambda _: workbench(FakeEngine(seconds=SECONDS))
        )
    os._exit(0 if result.complete else 3)


def fork(path: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            run_once(path)
        except BaseException as error:
            print(f"failed: {error!r}", flush=True)
        os._exit(1)
    return child


def main(path: Path, kills: int, seed: int, name: str) -> int:
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    rng = random.Random(seed)
    for _ in range(kills):
        child = fork(path)
        time.sleep(rng.uniform(0.02, 0.6))
        os.kill(child, getattr(signal, name))
        _, status = os.waitpid(child, 0)
        journal = path / "journal.jsonl"
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        print(f"child ended by {how} with {lines} lines in the journal", flush=True)
    _, status = os.waitpid(fork(path), 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
