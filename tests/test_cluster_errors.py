"""What an actor raises: borne where a search goes on without the answer, or asked thrice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from fake_engine import FakeEngine, make_config, workbench
from loralab import tasks
from loralab.config import EvolveConfig
from loralab.engines.base import Completion
from loralab.errors import UserError
from loralab.evolution import trainer
from loralab.evolution.cluster import worker
from loralab.tasks.base import Score
from test_cluster_fleet import Stage, clustered, stage

__all__ = ["stage"]
GUARDED = True


class Broken(FakeEngine):
    """Raises for the members of one pair, or `times` times for anything in generation 1."""

    def __init__(self, left: list[int], members: tuple[str, ...] = ("g1-",)) -> None:
        super().__init__()
        self._left, self._members = left, members

    def generate(self, requests: Any, progress: Any = None) -> list[Completion]:
        asked = any(str(request.adapter).startswith(self._members) for request in requests)
        if asked and self._left[0]:
            self._left[0] -= 1
            raise ZeroDivisionError("theirs")
        return super().generate(requests, progress)


def test_a_unit_that_always_raises_stops_the_run_after_three_actors(stage: Stage) -> None:
    config = clustered(make_config(generations=3), actors=8)
    broken = ("g1-m4", "g1-m5")
    with pytest.raises(
        UserError,
        match=r"unit generation 1 pairs \[2\] raised on 3 actors.*ZeroDivisionError: theirs.*--res",
    ):
        stage.run("run", config, lambda _: workbench(Broken([10**6], broken)))
    assert len(stage.crews[-1].workers) <= 8 + 3


def test_what_raises_now_and_then_is_asked_again(stage: Stage) -> None:
    config = make_config(generations=4)
    whole, _ = stage.run("one", config, lambda _: workbench())
    left = [2]
    result, _ = stage.run("two", clustered(config, actors=2), lambda _: workbench(Broken(left)))
    assert left == [0]
    assert replace(result, adapter=whole.adapter) == whole


def test_a_look_that_raises_ends_the_looks_and_no_actor(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def full(*_: Any) -> Any:
        nonlocal asked
        asked += 1
        raise RuntimeError("out of memory in the look")

    monkeypatch.setattr(worker, "subject_of", full)
    values = make_config(generations=4).model_dump(mode="json") | {"guard": {}}
    config = clustered(EvolveConfig.model_validate(values), actors=4)
    result, _ = stage.run("run", config)
    assert result.complete
    assert asked == 1, stage.notices
    assert len(stage.crews[-1].workers) == 4
    [line] = [text for text in stage.notices if "guard: looks at numbers alone" in text]
    assert "RuntimeError: out of memory in the look" in line


def test_the_guards_canaries_are_scored_beside_the_driver(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tasks.get("conciseness")
    asked = []

    class Scorer:
        """Of the driver, in place of one with processes."""

        def one(self, split: Any, example: Any, text: str) -> Score:
            asked.append(text)
            return here.score(example, text)

    @contextmanager
    def scorer_of(config: EvolveConfig) -> Iterator[Scorer]:
        yield Scorer()

    monkeypatch.setattr(trainer, "scorer_of", scorer_of)
    result, _ = stage.run("run", clustered(make_config(generations=1), actors=1))
    assert result.complete
    assert "" in asked
