"""Actors and driver see the same data and run the same libraries, or the run says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fake_engine import make_config, workbench
from loralab import tasks
from loralab.adapters.state import AdapterState, Factors
from loralab.config import EvolveConfig
from loralab.errors import UserError
from loralab.evolution.cluster import worker
from loralab.evolution.cluster.alike import examples_digest, facts_of
from loralab.evolution.start import Start
from loralab.evolution.workbench import Workbench
from test_cluster_fleet import Stage, clustered, stage

__all__ = ["stage"]


def differing(monkeypatch: pytest.MonkeyPatch, which: int | None, **versions: str) -> None:
    """Actors, or the one of that number, say that they run other versions."""
    opened = 0

    def facts(*arguments: Any) -> dict[str, Any]:
        nonlocal opened
        found = facts_of(*arguments)
        if which in (None, opened):
            found["versions"] = {**found["versions"], **versions}
        opened += 1
        return found

    monkeypatch.setattr(worker, "facts_of", facts)


@pytest.mark.parametrize("library", ["loralab", "torch", "tokenizers"])
@pytest.mark.parametrize("which", [None, 1])
def test_other_libraries_stop_the_run(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, library: str, which: int | None
) -> None:
    differing(monkeypatch, which, **{library: "0.0.7"})
    with pytest.raises(
        UserError, match=rf"actor \d on .* other versions than this .*{library} 0.0.7, here \d"
    ):
        stage.run("run", clustered(make_config(), actors=2))


def test_other_processors_are_said_once_each(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    differing(monkeypatch, None, vectors="AVX9")
    stage.run("run", clustered(make_config(generations=2), actors=3))
    [line] = [text for text in stage.notices if "another" in text]
    assert "has another CPU capability (AVX9; " in line
    stage.events.clear()
    differing(monkeypatch, 1, gpu="a GPU")
    stage.run("other", clustered(make_config(generations=2), actors=3))
    [line] = [text for text in stage.notices if "another" in text]
    assert "has another GPU" in line


def test_equal_nodes_are_not_spoken_of(stage: Stage) -> None:
    stage.run("run", clustered(make_config(generations=2), actors=2))
    assert not [text for text in stage.notices if "another" in text]


@pytest.mark.parametrize("where", ["prompts", "gold"])
def test_a_driver_with_other_data_than_its_actors_stops_the_run(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real = tasks.get("conciseness")
    other = type(real)()
    if where == "prompts":
        monkeypatch.setattr(other, "examples", lambda split: tuple(reversed(real.examples(split))))
    else:
        monkeypatch.setattr(other, "gold", lambda example: "another")
    assert examples_digest(other) != examples_digest(real) == examples_digest(type(real)())
    monkeypatch.setattr(worker.tasks, "get", lambda *_, **__: real)

    def facts(bench: Workbench, _: Any) -> dict[str, Any]:
        return facts_of(bench, other)

    monkeypatch.setattr(worker, "facts_of", facts)
    with pytest.raises(UserError, match=r"sees other data, .*, this process .*every node"):
        stage.run("run", clustered(make_config(), actors=2))


def test_a_start_is_made_where_the_driver_holds_the_model(stage: Stage) -> None:
    asked: list[EvolveConfig] = []

    def initialised(config: EvolveConfig, task: Any) -> Start:
        asked.append(config)
        g = torch.Generator().manual_seed(3)
        factors = {
            n: Factors(
                torch.randn(4, w.shape[1], generator=g),
                0.01 * torch.randn(w.shape[0], 4, generator=g),
            )
            for n, w in workbench().weights.items()
        }
        return Start(AdapterState(factors, 1.0), AdapterState(factors, 1.0))

    plain = make_config(generations=1).model_dump(mode="json") | {"device": "cuda"}
    plain["adapter"]["init"] = {"name": "pissa"}
    config = clustered(EvolveConfig.model_validate(plain), actors=1, gpus_per_actor=1.0)
    stage.run("run", config, lambda _: replace(workbench(), initialise=initialised))
    assert [(one.device, one.adapter.init.name) for one in asked] == [("cpu", "pissa")]
