"""From a config with a `cluster` to a fleet, and the workbench that the driver has beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from loralab import tasks
from loralab.config import EngineConfig, EvolveConfig
from loralab.evolution.cluster.alike import Alike, facts_of
from loralab.evolution.cluster.crew import RayCrew
from loralab.evolution.cluster.elsewhere import ElsewhereEngine
from loralab.evolution.cluster.fleet import Fleet
from loralab.evolution.events import OnEvent
from loralab.evolution.start import Start
from loralab.evolution.workbench import Open, Workbench
from loralab.tasks.base import Task


@dataclass(frozen=True)
class Site:
    """bench: the model's weights, in this process's memory, and the actors' engine."""

    fleet: Fleet
    bench: Workbench


@contextmanager
def open_site(config: EvolveConfig, open_workbench: Open, on_event: OnEvent) -> Iterator[Site]:
    """Start the actors of the config's cluster; they are gone when the block ends.

    Raises:
        UserError: no actor can start, or one is not what the others are.
    """
    cluster = config.cluster
    assert cluster is not None
    crew = RayCrew(cluster, actors_config(config).to_dict(), open_workbench)
    fleet = Fleet(crew, crew.size, cluster.restarts, cluster.start_seconds, on_event)
    try:
        fleet.hire()
        here = open_workbench(drivers_config(config))
        task = tasks.get(config.task.name, **config.task.options)
        fleet.alike = Alike(facts_of(here, task), on_event)
        engine = ElsewhereEngine(fleet, fleet.open(), here.engine)

        def initialise(config: EvolveConfig, task: Task) -> Start:
            return here.initialise(drivers_config(config), task)

        yield Site(fleet, replace(here, engine=engine, initialise=initialise))
    finally:
        fleet.close()
        crew.close()


def actors_config(config: EvolveConfig) -> EvolveConfig:
    """What actors are asked to run. Threads are set: how sums are split among them shows in the
    last bit of a point."""
    cluster = config.cluster
    assert cluster is not None
    device = config.device if cluster.gpus_per_actor else "cpu"
    return config.model_copy(update={"device": device, "threads": _threads(config)})


def drivers_config(config: EvolveConfig) -> EvolveConfig:
    """What the driver holds of the model: its weights in memory, never on a device."""
    held = {"device": "cpu", "threads": _threads(config), "engine": EngineConfig(backend="torch")}
    return config.model_copy(update=held)


def _threads(config: EvolveConfig) -> int:
    assert config.cluster is not None
    return config.threads or config.cluster.cpus_per_actor
