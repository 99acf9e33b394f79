"""Actors of Ray. Ray is imported when a cluster is asked for, and not before."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from loralab.config.evolve import ClusterConfig
from loralab.errors import UserError
from loralab.evolution.cluster.fleet import Lost
from loralab.evolution.cluster.messages import Files
from loralab.evolution.cluster.worker import Worker
from loralab.evolution.workbench import Open

_LARGE = 2**16
"""Bytes of files from which they are put into Ray's store once, and fetched from there."""


class RayCrew:
    """Joins or starts the Ray cluster of a config; `close` leaves it.

    config: of the actors, as `EvolveConfig.to_dict` gives it.

    Raises:
        UserError: Ray is not installed, the cluster is not there, or not one actor fits.
    """

    def __init__(
        self, cluster: ClusterConfig, config: Mapping[str, Any], open_workbench: Open
    ) -> None:
        try:
            import ray
        except ImportError:
            raise UserError(
                "cluster.name ray needs Ray: pip install 'loralab[ray]', here and on every node"
            ) from None
        self._ray = ray
        self._arguments = (dict(config), open_workbench)
        self._options = {
            "num_cpus": cluster.cpus_per_actor,
            "num_gpus": cluster.gpus_per_actor,
            "max_restarts": 0,
            # Over the nodes, so that one that is lost takes few of them.
            "scheduling_strategy": "SPREAD",
        }
        self._joined = not ray.is_initialized()
        self._stored: tuple[Files, Any] | None = None
        if self._joined:
            _join(ray, cluster)
        self.size = _fitting(ray, cluster)

    def hire(self) -> Any:
        return self._ray.remote(Worker).options(**self._options).remote(*self._arguments)

    def call(self, actor: Any, message: bytes, files: Files) -> Any:
        given: Any = dict(files)
        if sum(map(len, given.values())) > _LARGE:
            if self._stored is None or self._stored[0] is not files:
                self._stored = (files, self._ray.put(given))
            given = self._stored[1]
        return actor.do.remote(message, given)

    def wait(self, tickets: Sequence[Any], seconds: float) -> list[Any]:
        # All that are there already, not the first alone.
        done, rest = self._ray.wait(list(tickets), num_returns=1, timeout=seconds)
        if done and rest:
            done += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return list(done)

    def answer(self, ticket: Any) -> bytes:
        errors = self._ray.exceptions
        try:
            return bytes(self._ray.get(ticket))
        except errors.RayTaskError as error:
            raise Lost(_one_line(error.cause)) from error
        except errors.RayError as error:
            raise Lost(_one_line(error)) from error

    def dismiss(self, actor: Any) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """Leave the cluster, and end it where it was started here."""
        if self._joined:
            self._ray.shutdown()


def _join(ray: Any, cluster: ClusterConfig) -> None:
    # Ray tells its makers of every start unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": cluster.address or "local"}
    if cluster.address is None:
        wanted = (cluster.actors or 0) * cluster.cpus_per_actor
        options |= {"include_dashboard": False}
        if wanted > (os.cpu_count() or 1):
            options["num_cpus"] = wanted
    try:
        with _own_signals():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cluster.address {cluster.address or 'null'}: no Ray cluster could be joined: "
            f"{_one_line(error)}"
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray ends the process at SIGTERM; ours finishes its generation first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _fitting(ray: Any, cluster: ClusterConfig) -> int:
    """How many actors to hire: those asked for, or as many as there is room for now."""
    if cluster.actors is not None:
        return cluster.actors
    there = ray.cluster_resources()
    room = [there.get("CPU", 0) // cluster.cpus_per_actor]
    if cluster.gpus_per_actor:
        room.append(there.get("GPU", 0) / cluster.gpus_per_actor)
    if min(room) < 1:
        raise UserError(
            f"cluster.actors null: not one fits; the cluster has {there.get('CPU', 0):g} CPUs and "
            f"{there.get('GPU', 0):g} GPUs, an actor needs {cluster.cpus_per_actor} and "
            f"{cluster.gpus_per_actor:g}"
        )
    return int(min(room))


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
