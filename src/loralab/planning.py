"""What a config asks for, told without loading a model: what `--dry-run` prints."""

from __future__ import annotations

from loralab import tasks
from loralab.config import EvolveConfig


def plan(config: EvolveConfig) -> list[str]:
    """Sizes of the run, one a line.

    Raises:
        UserError: the task or one of its options is wrong.
    """
    task = tasks.get(config.task.name, **config.task.options)
    train, test = len(task.examples("train")), len(task.examples("test"))
    evolution = config.evolution
    prompts = min(evolution.samples_per_generation or train, train)
    held_out = min(evolution.test_samples or test, test)
    completions = evolution.generations * evolution.population * prompts
    return [
        f"task {task.name}: {train} training and {test} test examples",
        f"{evolution.generations} generations x {evolution.population} members x {prompts} prompts "
        f"= {completions:,} completions of up to {config.generation.max_new_tokens} tokens",
        f"held-out score on {held_out} examples every {evolution.eval_every} generations",
    ]
