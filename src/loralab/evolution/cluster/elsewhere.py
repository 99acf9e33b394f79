"""The engine of a search on a cluster, as the driver sees it: what is asked is answered there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from loralab.adapters.state import AdapterState
from loralab.engines.base import Completion, Progress, Request
from loralab.errors import UserError
from loralab.evolution.cluster.fleet import Fleet, Job
from loralab.evolution.cluster.messages import Message, boxed
from loralab.evolution.space import Centre
from loralab.evolution.workbench import PopulationEngine
from loralab.health.prompts import Prompt
from loralab.health.reading import Reading

_JOB = 32
"""Requests of one job."""


class ElsewhereEngine:
    """Generates on whichever actors are free. A search does not load its members here: they are
    made where they run, in a `ClusterArena`; adapters that are loaded here are sent.

    facts: what an actor says of its engine. here: holds the weights that a merged model is saved
    from.
    """

    def __init__(self, fleet: Fleet, facts: Mapping[str, Any], here: PopulationEngine) -> None:
        self._fleet, self._here = fleet, here
        self.kernel: str = facts["kernel"]
        self.accepts: frozenset[str] = frozenset(facts["accepts"])
        self._adapters: Mapping[str, AdapterState] = {}
        self._moved = False

    def load(self, adapters: Mapping[str, AdapterState]) -> None:
        """Replace the loaded adapters. Raises UserError for a kind that the actors cannot run."""
        for name, state in adapters.items():
            if state.kind not in self.accepts:
                raise UserError(
                    f"adapter {name!r} is of kind {state.kind!r}: the engine on the cluster runs "
                    f"{', '.join(sorted(self.accepts))} only"
                )
        self._adapters = dict(adapters)

    def set_base(self, changes: Mapping[str, Tensor]) -> None:
        """Move the weights of this process, which a merged model is saved from, and no others."""
        self._here.set_base(changes)
        self._moved = bool(changes)

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[Completion]:
        """Completions in the order of the requests, on the true base.

        Raises:
            UserError: an adapter is unknown, or the weights were moved.
        """
        if self._moved:
            raise UserError("the base was moved in this process alone: actors hold the true one")
        for request in requests:
            if request.adapter is not None and request.adapter not in self._adapters:
                known = ", ".join(list(self._adapters)[:8]) or "none"
                raise UserError(
                    f"adapter {request.adapter!r} is not loaded (loaded: {known}): call load first"
                )
        # Those of one adapter together: it is sent to few actors then.
        order = sorted(range(len(requests)), key=lambda at: requests[at].adapter or "")
        pieces = [order[at : at + _JOB] for at in range(0, len(order), _JOB)]
        found: dict[int, Completion] = {}

        def heard(place: int, answer: Mapping[str, Any]) -> None:
            for at, (text, tokens, reason, error) in zip(
                pieces[place], answer["completions"], strict=True
            ):
                found[at] = Completion(text, tuple(tokens), reason, error)
            if progress is not None:
                progress(len(found), len(requests))

        self._fleet.run([self._job([requests[at] for at in piece]) for piece in pieces], heard)
        return [found[at] for at in range(len(requests))]

    def looked(self, prompts: Sequence[Prompt], seed: int) -> LookedElsewhere:
        """What looks at the search's points where they are; its seed is that of the config."""
        return LookedElsewhere(self._fleet, prompts)

    def _job(self, requests: Sequence[Request]) -> Job:
        names = {request.adapter for request in requests if request.adapter is not None}
        rows, files = boxed({name: self._adapters[name] for name in sorted(names)})
        asked = [(one.prompt, one.adapter, asdict(one.sampling)) for one in requests]
        return lambda: ({"kind": "serve", "requests": asked, "adapters": rows}, files)


class LookedElsewhere:
    """Has an actor look at its own state, which is the driver's: no point is sent."""

    def __init__(self, fleet: Fleet, prompts: Sequence[Prompt]) -> None:
        self._fleet = fleet
        self._prompts = [(one.text, one.messages, one.kind, one.good) for one in prompts]

    def reading(self, centre: Centre, step: int) -> Reading:
        """Of the centre of generation `step`."""
        return Reading.from_json(self._asked("look", step)["reading"])

    def divergence(self, point: Centre) -> float:
        """Of the first member of generation 0, the one point that a guard asks it of."""
        return float(self._asked("reach", 0)["divergence"])

    def _asked(self, kind: str, generation: int) -> dict[str, Any]:
        message: Message = {"kind": kind, "generation": generation, "prompts": self._prompts}
        [answer] = self._fleet.run([lambda: (message, {})])
        return answer
