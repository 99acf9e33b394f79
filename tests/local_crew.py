"""A crew of actors in this process, slow and lost at random: what Ray does, in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from loralab.config.evolve import ClusterConfig
from loralab.evolution.cluster.fleet import Lost
from loralab.evolution.cluster.messages import Files, unpack
from loralab.evolution.cluster.worker import Worker
from loralab.evolution.workbench import Open


class LocalCrew:
    """`RayCrew`'s stand-in. losses: share of calls whose actor is lost, some after their work is
    done; 0 for the calls named in `safe`."""

    made: list[LocalCrew]

    def __init__(
        self,
        cluster: ClusterConfig,
        config: Mapping[str, Any],
        open_workbench: Open,
        *,
        losses: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.size = cluster.actors or 2
        self._arguments = (config, open_workbench)
        self._losses, self._random = losses, random.Random(seed)
        self._calls: dict[int, tuple[Worker, bytes, Files]] = {}
        self._done: dict[int, bytes | None] = {}
        self.workers: list[Worker] = []
        self.kinds: list[tuple[int, str]] = []
        """Which worker was sent what."""
        self.bytes = 0
        self.closed = False

    def hire(self) -> Worker:
        self.workers.append(Worker(*self._arguments))
        return self.workers[-1]

    def call(self, actor: Worker, message: bytes, files: Files) -> int:
        ticket = len(self._calls) + len(self._done)
        assert all(worker is not actor for worker, _, _ in self._calls.values()), "one at a time"
        self._calls[ticket] = (actor, message, files)
        self.kinds.append((self.workers.index(actor), unpack(message)["kind"]))
        self.bytes += len(message) + sum(map(len, files.values()))
        return ticket

    def wait(self, tickets: Sequence[int], seconds: float) -> list[int]:
        ticket = self._random.choice(tickets)
        worker, message, files = self._calls.pop(ticket)
        kind = self._random.random()
        lost = kind < self._losses
        answer = None if lost and kind < self._losses / 2 else worker.do(message, files)
        self._done[ticket] = None if lost else answer
        return [ticket]

    def answer(self, ticket: int) -> bytes:
        answer = self._done[ticket]
        if answer is None:
            raise Lost("killed by the test")
        return answer

    def dismiss(self, actor: Worker) -> None:
        for ticket, (worker, _, _) in list(self._calls.items()):
            if worker is actor:
                del self._calls[ticket]
                self._done[ticket] = None

    def close(self) -> None:
        self.closed = True
