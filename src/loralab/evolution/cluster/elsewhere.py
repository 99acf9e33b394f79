"""The engine of a search on a cluster, as the driver sees it: what is asked is answered there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from loralab.adapters.state import AdapterState
from loralab.engines.base import Completion, Progress, Request
from loralab.errors import UserError
from loralab.evolution.cluster.fleet import Fleet
from loralab.evolution.cluster.messages import Message
from loralab.evolution.space import Centre
from loralab.evolution.workbench import PopulationEngine
from loralab.health.prompts import Prompt
from loralab.health.reading import Reading


class ElsewhereEngine:
    """Answers of the base come from an actor; members are met in a `ClusterArena`.

    kernel: of the actors. here: holds the weights that a merged model is saved from.
    """

    accepts: frozenset[str] = frozenset()

    def __init__(self, fleet: Fleet, kernel: str, here: PopulationEngine) -> None:
        self._fleet, self._here = fleet, here
        self.kernel = kernel

    def load(self, adapters: Mapping[str, AdapterState]) -> None:
        """Raises UserError of any adapter: none is sent."""
        if adapters:
            raise UserError(
                f"adapter {next(iter(adapters))!r}: a cluster makes the members of its search "
                "itself and is sent none; load it into an engine here"
            )

    def set_base(self, changes: Mapping[str, Tensor]) -> None:
        """Move the weights of this process, which are saved; actors move their own."""
        self._here.set_base(changes)

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[Completion]:
        """The base's completions, of one actor. Raises UserError for an adapter."""
        for request in requests:
            if request.adapter is not None:
                self.load({request.adapter: AdapterState({}, 1.0)})
        asked = [(request.prompt, asdict(request.sampling)) for request in requests]
        [answer] = self._fleet.run([lambda: {"kind": "base", "requests": asked}])
        if progress is not None:
            progress(len(requests), len(requests))
        return [
            Completion(text, tuple(tokens), reason, error)
            for text, tokens, reason, error in answer["completions"]
        ]

    def looked(self, prompts: Sequence[Prompt], seed: int) -> LookedElsewhere:
        """What looks at the search's points where they are; its seed is that of the config."""
        return LookedElsewhere(self._fleet, prompts)


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
        [answer] = self._fleet.run([lambda: message])
        return answer
