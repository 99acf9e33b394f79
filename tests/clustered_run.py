"""A search on a Ray cluster of several nodes: `python clustered_run.py RUN_DIR ADDRESS ACTORS`.

Its module is where actors find the workbench. Generating takes a while, so that there is
something to kill.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fake_engine import FakeEngine, make_config, workbench
from loralab.config import EvolveConfig
from loralab.config.evolve import ClusterConfig
from loralab.evolution.events import Event, GenerationDone, Notice
from loralab.evolution.trainer import evolve
from loralab.evolution.workbench import Workbench
from loralab.run import Run

GENERATIONS = 12
SECONDS = 0.05
"""Of one call of the engine."""


def bench(config: EvolveConfig) -> Workbench:
    return workbench(FakeEngine(seconds=SECONDS))


def config_for(address: str | None, **cluster: object) -> EvolveConfig:
    config = make_config(generations=GENERATIONS, eval_every=5, optimizer={"name": "momentum"})
    options = {"address": address, "restarts": 100, **cluster}
    return config.model_copy(update={"cluster": ClusterConfig.model_validate(options)})


def tell(event: Event) -> None:
    if isinstance(event, Notice):
        print(event.text, flush=True)
    elif isinstance(event, GenerationDone):
        print(f"generation {event.generation}", flush=True)


def main(path: Path, address: str, actors: int) -> int:
    config = config_for(address, actors=actors)
    values = config.to_dict()
    fresh = not (path / "config.yaml").exists()
    with Run.create(path, values) if fresh else Run.resume(path, values) as run:
        return 0 if evolve(config, run, tell, bench).complete else 3


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
