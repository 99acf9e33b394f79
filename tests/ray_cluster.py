"""A Ray cluster of several nodes on this machine, and the processes of its actors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

_STORE = 80 * 2**20
"""Bytes of a node's object store: about the least that Ray takes."""


class Nodes:
    """A head without room for actors, and nodes with room for one actor each."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self._cluster.add_node(**self._room) for _ in range(count)]
        self._cluster.wait_for_nodes(timeout=120)
        self.address: str = self._cluster.address

    _room = {"num_cpus": 1, "object_store_memory": _STORE}  # noqa: RUF012

    def actors(self) -> list[psutil.Process]:
        """Processes of actors, wherever they are; those of other clusters are not among them."""
        found = []
        for node in self.nodes:
            for kind, processes in node.all_processes.items():
                if kind == "raylet":
                    found += _workers(processes[0].process.pid)
        return found

    def kill_actor(self, choose: Callable[[list[Any]], Any]) -> int | None:
        """SIGKILL to one of the actors there are; its process id."""
        actors = self.actors()
        if not actors:
            return None
        pid: int = choose(actors).pid
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill_node(self) -> None:
        """End a node at once, with what runs on it, and add a fresh one."""
        self._cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
        self.nodes.append(self._cluster.add_node(**self._room))

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def nodes_of(count: int) -> Iterator[Nodes]:
    """Nodes whose actors import from tests/."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray starts workers at 15: beside anything else on this machine they would not get on.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray reads it in lower case
    try:
        nodes = Nodes(count)
        try:
            yield nodes
        finally:
            nodes.close()
    finally:
        os.environ.clear()
        os.environ.update(before)


def wait_until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something on a machine that may be busy."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not so after {seconds:g} s"
        time.sleep(0.1)


def _workers(raylet: int) -> list[psutil.Process]:
    try:
        children = psutil.Process(raylet).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found = []
    for child in children:
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::Worker"):
                found.append(child)
        except psutil.Error:
            continue
    return found
