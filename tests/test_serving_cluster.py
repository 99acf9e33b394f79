"""The serving contract on engines that are on actors: of this process, and (slowly) of Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import tiny
from local_crew import LocalCrew
from loralab.config import parse_evolve
from loralab.engines.batched import BatchedEngine
from loralab.evolution.cluster import opening
from loralab.evolution.events import ignore
from loralab.evolution.workbench import open_batched
from ray_cluster import nodes_of
from serving_contract import ServingContract, Subject, ending_request, tiny_adapters, tiny_prompts


def subject_on(folder: Path, until_end: ExitStack, address: str | None = None) -> Subject:
    model, ends = tiny.model("llama"), frozenset({tiny.EOS})
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    values: dict[str, Any] = {
        "kind": "evolve",
        "name": "serving",
        "model": str(folder),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "task": {"name": "conciseness"},
        "evolution": {"generations": 1, "population": 2},
        "cluster": {"address": address, "actors": 2},
    }
    config = parse_evolve(values, "test")
    site = until_end.enter_context(opening.open_site(config, open_batched, ignore))
    engine = site.bench.engine
    return Subject(
        engine,
        tiny_adapters(model),
        tiny_prompts(),
        ending=ending_request(engine, ends),
        ends=ends,
        context=model.config.max_position_embeddings,
        begins="<bos>",
        reference=BatchedEngine(model, tiny.tokenizer(), backend="torch", threads=1),
    )


class TestLocal(ServingContract):
    """Actors in this process."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        with pytest.MonkeyPatch.context() as patch, ExitStack() as until_end:
            patch.setattr(opening, "RayCrew", LocalCrew)
            yield subject_on(tmp_path_factory.mktemp("serving"), until_end)


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestRay(ServingContract):
    """Actors on two nodes."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        with ExitStack() as until_end:
            nodes = until_end.enter_context(nodes_of(2))
            yield subject_on(tmp_path_factory.mktemp("serving"), until_end, nodes.address)
