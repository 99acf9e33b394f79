"""A run by evolution, with its guard on."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

from loralab import durable, tasks
from loralab.adapters.attach import targeted_weights
from loralab.bench.faults.plan import Plan
from loralab.bench.faults.tasks import Small
from loralab.bench.faults.world import World
from loralab.config import parse_evolve
from loralab.engines.batched import BatchedEngine
from loralab.evolution import guarded
from loralab.evolution.trainer import evolve
from loralab.evolution.workbench import Workbench
from loralab.health.reading import Reading
from loralab.health.rules import judge
from loralab.run import Run
from loralab.tasks.base import Example, Score


class Rewarded:
    """A task with another reward, if the plan has one."""

    def __init__(self, task: Small, plan: Plan) -> None:
        self._task, self._plan = task, plan
        self.name, self.reward_floor = task.name, -10.0
        self.examples, self.prompt, self.gold = task.examples, task.prompt, task.gold

    def score(self, example: Example, completion: str) -> Score:
        if self._plan.score is not None:
            return self._plan.score(self._task, example, completion)
        return self._task.score(example, completion)


def search(plan: Plan, task: Small, world: World, seed: int, folder: Path) -> dict[str, Any]:
    """What the search and its guard saw: generations, and the readings that were judged, of texts
    and of each generation's numbers. The best adapter is in `folder`/run/adapter."""
    model, tokenizer = world.open(plan.dtype)
    for change in plan.on_base:
        change(model)
    config = parse_evolve(settings(plan, world, seed), "bench faults")
    judged: list[Reading] = []

    def judge_and_keep(readings: Sequence[Reading], *rules: Any) -> Any:
        judged.append(readings[-1])
        return judge(readings, *rules)

    began = perf_counter()
    bench = Workbench(
        BatchedEngine(model, tokenizer), targeted_weights(model, config.adapter), lambda _: None
    )
    with (
        Run.create(folder / "run", config.to_dict()) as run,
        # The searched task is made here and is in no registry.
        patch.object(tasks, "get", lambda name, **options: Rewarded(task, plan)),
        # A guard writes down its looks, but not the numbers of generations that it judges.
        patch.object(guarded, "judge", judge_and_keep),
    ):
        evolve(config, run, open_workbench=lambda _: bench)
        rows = list(run.metrics())
    searched = perf_counter() - began
    told = durable.read_lines(folder / "run" / "findings.jsonl")
    # Other parts of a run write there too.
    findings = [row for row in told if "severity" in row and "step" in row]
    readings = durable.read_lines(folder / "run" / "readings.jsonl")
    seconds = sum(reading["seconds"] for reading in readings)
    numbers = [one for one in judged if "es.dominance" in one.values]
    return {
        "log": [
            {"step": row["generation"] + 1, "loss": -row["reward_mean"]}
            for row in rows
            if isfinite(row.get("reward_mean", float("nan")))
        ],
        "generations": rows,
        "numbers": [one.to_json() for one in numbers],
        "dominance": numbers[-1].values["es.dominance"] if numbers else None,
        "readings": readings,
        "findings": findings,
        "guard_seconds": seconds,
        "guard_share": seconds / (searched - seconds),
    }


def settings(plan: Plan, world: World, seed: int) -> dict[str, Any]:
    """The config of an evolution, as its YAML would be."""
    kept = [one for one in world.prompts if one.text is not None]
    asked = [
        world.tokenizer.apply_chat_template(
            list(one.messages), tokenize=False, add_generation_prompt=True
        ).removeprefix(world.tokenizer.bos_token or "")
        for one in world.prompts
        if one.messages is not None
    ]
    return {
        "kind": "evolve",
        "name": "fault",
        "model": world.name,
        "dtype": plan.dtype or world.dtype,
        "seed": seed,
        "task": {"name": "small"},
        "adapter": {"rank": plan.rank, "alpha": plan.alpha},
        "evolution": plan.search,
        "generation": {"max_new_tokens": 16},
        "guard": {"prompts": [*(one.text for one in kept), *asked]},
    }
