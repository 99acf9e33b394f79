"""Whether nodes are alike: what they see, and what their arithmetic comes from.

Other data, another model or other libraries would make a search that no one machine could repeat,
in silence; another processor may, in the last bit of a logit.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from hashlib import blake2b
from importlib import metadata
from typing import Any

import torch

from loralab.environment import describe
from loralab.errors import UserError
from loralab.evolution.events import Notice, OnEvent
from loralab.evolution.workbench import Workbench, fingerprint
from loralab.tasks.base import Task

LIBRARIES = ("loralab", "python", "torch", "numpy", "transformers", "tokenizers")
_HARDWARE = {"cpu": "CPU", "vectors": "CPU capability", "gpu": "GPU"}
_SEEN = {
    "kernel": "runs kernel",
    "model": "holds another model, of digest",
    "examples": "sees other data, of digest",
}


def facts_of(bench: Workbench, task: Task) -> dict[str, Any]:
    """What this process holds and runs on. gpu: its name where the weights are on one, else
    absent: of an engine that holds them elsewhere none is known."""
    known = describe()
    versions = {name: known[name] for name in (*LIBRARIES[:5], "cpu")}
    versions["tokenizers"] = metadata.version("tokenizers")
    versions["vectors"] = torch.backends.cpu.get_cpu_capability()
    device = next(iter(bench.weights.values())).device
    if device.type == "cuda":
        versions["gpu"] = torch.cuda.get_device_name(device)
    return {
        "kernel": bench.engine.kernel,
        "model": fingerprint(bench.weights),
        "examples": examples_digest(task),
        "node": platform.node(),
        "versions": versions,
    }


class Alike:
    """Compares what actors say of themselves with one another, and with the driver.

    here: the driver's facts; of its engine and its GPU nothing is asked.
    """

    def __init__(self, here: Mapping[str, Any], on_event: OnEvent) -> None:
        self._here, self._on_event = here, on_event
        self._first: Mapping[str, Any] | None = None
        self._told: set[tuple[str, str]] = set()

    def check(self, name: str, facts: Mapping[str, Any]) -> None:
        """Of an actor that has opened. Other hardware is said once.

        Raises:
            UserError: it sees or runs something else than the others or the driver.
        """
        first = self._first = self._first or facts
        for key, what in _SEEN.items():
            if facts[key] != first[key]:
                raise UserError(
                    f"{name} {what} {facts[key]}, the one on {first['node']} {first[key]}: "
                    "every node needs the same engine, model and data"
                )
            if key != "kernel" and facts[key] != self._here[key]:
                raise UserError(
                    f"{name} {what} {facts[key]}, this process {self._here[key]}: every node needs "
                    "the same engine, model and data, the one that the run is started on too"
                )
        there, here = facts["versions"], self._here["versions"]
        differ = [key for key in LIBRARIES if there.get(key) != here.get(key)]
        if differ:
            told = ", ".join(f"{key} {there.get(key)}, here {here.get(key)}" for key in differ)
            raise UserError(
                f"{name} runs other versions than this process ({told}): every node needs the same"
            )
        for key, what in _HARDWARE.items():
            other = here if key != "gpu" else first["versions"]
            found = str(there.get(key))
            if there.get(key) != other.get(key) and (key, found) not in self._told:
                self._told.add((key, found))
                self._on_event(
                    Notice(
                        f"{name} has another {what} ({found}; {other.get(key)} elsewhere): it may "
                        "write other text in a unit than another actor would, so that this run "
                        "cannot be repeated to the bit"
                    )
                )


def examples_digest(task: Task) -> str:
    """Hex digest of the examples' names, prompts and gold answers: tells whether two nodes see the
    same data."""
    digest = blake2b(digest_size=16)
    for split in ("train", "test"):
        for example in task.examples(split):
            told = f"{split}|{example.id}|{task.prompt(example)!r}|{task.gold(example)!r}\n"
            digest.update(told.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
