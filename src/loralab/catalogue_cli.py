"""What there is: `loralab inits`, `probes` and `tasks`, and `tasks check`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loralab.arguments import task_options

if TYPE_CHECKING:
    from loralab.tasks.base import Split


def inits(arguments: argparse.Namespace) -> int:
    """The initialisations and their facts."""
    import json
    from dataclasses import asdict

    from loralab.registry import INITS

    facts = {name: asdict(INITS.load(name).facts) for name in INITS.names()}
    if arguments.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for name, row in facts.items():
        quantized = "yes" if row["quantized"] else "no, refused before training"
        print(f"{name}\n    {row['formula']}\n    source: {row['source']}")
        print(f"    unchanged at step 0: {row['unchanged']}; on nf4 / int8: {quantized}")
        print(f"    cost: {row['cost']}; needs: {row['needs']}")
    return 0


def probes(arguments: argparse.Namespace) -> int:
    """The probes, what they measure and cost."""
    import json

    from loralab.registry import PROBES

    found = {name: PROBES.load(name) for name in PROBES.names()}
    facts = {n: {"measures": probe.measures, "cost": probe.cost} for n, probe in found.items()}
    if arguments.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for name, row in facts.items():
        print(f"{name}\n    {row['measures']}\n    cost: {row['cost']}")
    return 0


def tasks(arguments: argparse.Namespace) -> int:
    """The tasks by name."""
    from loralab.registry import TASKS

    for name in TASKS.names():
        print(f"{name:<16} {TASKS.target(name)}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Prove a task's grader; 1 if it is broken."""
    from loralab import tasks
    from loralab.tasks.check import check

    task = tasks.get(arguments.name, **task_options(arguments))
    sound = True
    splits: Sequence[Split] = (arguments.split,) if arguments.split else ("train", "test")
    if arguments.split is None:  # a test set has no train split
        splits = [split for split in splits if task.examples(split)] or splits
    for split in splits:
        result = check(task, split, arguments.limit)
        verdict = "sound" if result.passed else "BROKEN"
        golds = result.examples - len(result.without_gold)
        print(f"{result.task}, {split}: {verdict}; {golds} gold answers of {result.examples}")
        for failure in result.failures[:20]:
            print(f"  {failure.example}: {failure.what}: {failure.reason}")
        sound = sound and result.passed
    return 0 if sound else 1
