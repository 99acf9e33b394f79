"""What an actor does: it holds an engine and a state of the search, and answers messages.

It knows nothing of Ray. Every answer names the digest of the state it was worked out from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loralab import tasks
from loralab.adapters.state import AdapterState
from loralab.config import parse_evolve
from loralab.engines.base import Request, Sampling
from loralab.errors import UserError
from loralab.evolution.arena import (
    Answered,
    Examples,
    answered,
    centre_name,
    member_name,
    scorer_of,
)
from loralab.evolution.centre import Looked, subject_of
from loralab.evolution.cluster.alike import facts_of
from loralab.evolution.cluster.messages import (
    Files,
    Message,
    floats,
    in_full,
    loaded,
    outlined,
    pack,
    unpack,
)
from loralab.evolution.journal import Header
from loralab.evolution.layout import Floats
from loralab.evolution.outputs import cast_adapter
from loralab.evolution.replay import as_adapter, first_state
from loralab.evolution.space import NOISE_KEPT, Centre, Perturbed
from loralab.evolution.start import START
from loralab.evolution.strategy import Population, SearchState, moved
from loralab.evolution.weight_space import ROWS_COMPARED
from loralab.evolution.workbench import Open, Workbench, sample_rows
from loralab.health.prompts import Prompt
from loralab.rollouts import Batch, Rollout
from loralab.tasks.base import Task
from loralab.timings import Timings


class Worker:
    """An actor. `do` answers one message; nothing is loaded before "open".

    config: as `EvolveConfig.to_dict` gives it, device and threads those of the actor.
    """

    def __init__(self, config: Mapping[str, Any], open_workbench: Open) -> None:
        self._config = parse_evolve(config, "the driver's config")
        self._open = open_workbench
        self._state: SearchState | None = None
        self._best: tuple[SearchState, float] | None = None
        self._noise: dict[int, Floats] = {}
        self._subjects: dict[str, Looked] = {}

    def do(self, message: bytes, files: Files | None = None) -> bytes:
        """The answer to a message; what goes wrong is an answer too, so that its words arrive."""
        try:
            job = unpack(message)
            jobs: dict[str, Callable[[dict[str, Any], Files], dict[str, Any]]] = {
                "open": self._opened,
                "begin": self._begun,
                "advance": self._advanced,
                "unit": self._unit,
                "test": self._tested,
                "look": self._looked,
                "reach": self._reached,
                "serve": self._served,
            }
            return pack(jobs[job["kind"]](job, files or {}))
        except UserError as error:
            return pack({"error": str(error), "mendable": True})
        except Exception as error:
            said = " ".join(str(error).split())
            return pack({"error": f"{type(error).__name__}: {said}", "mendable": False})

    @cached_property
    def _bench(self) -> Workbench:
        return self._open(self._config)

    @cached_property
    def _task(self) -> Task:
        return tasks.get(self._config.task.name, **self._config.task.options)

    @cached_property
    def _examples(self) -> Examples:
        return Examples(self._config, self._task, scorer_of(self._config))

    def _opened(self, job: Message, files: Files) -> dict[str, Any]:
        accepts = sorted(self._bench.engine.accepts)
        return {**facts_of(self._bench, self._task), "accepts": accepts}

    def _begun(self, job: Message, files: Files) -> dict[str, Any]:
        row = job["header"]
        shapes = {name: (out, in_) for name, (out, in_) in row["shapes"].items()}
        rows = {n: sample_rows(w, ROWS_COMPARED) for n, w in self._bench.weights.items()}
        with TemporaryDirectory(prefix="loralab-") as folder:
            for name, content in files.items():
                path = Path(folder, START, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._state = first_state(Header(**{**row, "shapes": shapes}), Path(folder), rows)
        self._best, self._noise = None, {}
        return self._advanced(job, files)

    def _advanced(self, job: Message, files: Files) -> dict[str, Any]:
        for entry in job["entries"]:
            state, held_out = self._at(entry["generation"]), entry["held_out"]
            if held_out is not None and (self._best is None or held_out > self._best[1]):
                self._best = (state, held_out)
            pairs = self._pairs(state)
            nothing = torch.empty(0).numpy()
            noise = tuple(self._noise.get(pair, nothing) for pair in range(pairs))
            made = Population(state.generation, Perturbed(Centre(None), (), noise, None))
            self._noise = {}
            self._state = moved(state, made, floats(entry["weights"]))
        assert self._state is not None
        return {"digest": _digest(self._state), "generation": self._state.generation}

    def _unit(self, job: Message, files: Files) -> dict[str, Any]:
        """Members of some pairs on the generation's prompts."""
        state, only = self._at(job["generation"]), job["pairs"]
        options = state.options
        perturbed = state.space.perturb(
            state.master,
            state.seed,
            state.generation,
            options.population,
            options.antithetic,
            state.sigma_scale,
            torch.get_num_threads(),
            only,
        )
        self._keep(only, perturbed.noise)
        signs = 2 if options.antithetic else 1
        numbers = [signs * pair + sign for pair in only for sign in range(signs)]
        names = [member_name(state.generation, number) for number in numbers]
        batch = self._examples.training(state.generation, job["indices"])
        adapters = dict(zip(names, perturbed.members, strict=True))
        done = self._answered(perturbed.centre, adapters, [(name, batch) for name in names])
        rollouts = [rollout for row in done.rollouts for rollout in row]
        return {
            "digest": _digest(state),
            "outline": outlined(rollouts),
            "top": _top(rollouts, job["beat"], numbers[0] * len(batch.examples)),
            "tokens": done.tokens,
            "unchanged_share": perturbed.unchanged_share,
        }

    def _tested(self, job: Message, files: Files) -> dict[str, Any]:
        """The centre of a state, or what is saved of it, on some of the held-out prompts."""
        state = self._at(job["generation"])
        centre = state.space.centre(state.master)
        if job["saved"]:
            weights = self._bench.weights.values()
            adapter, _ = as_adapter(state, self._config)
            centre = Centre(cast_adapter(adapter, next(iter(weights)).dtype))
        whole = self._examples.held_out
        batch = replace(whole, examples=tuple(whole.examples[i] for i in job["places"]))
        adapters: dict[str, AdapterState] = {}
        name = None
        if centre.adapter is not None:
            name = centre_name(state.generation) + ("-saved" if job["saved"] else "")
            adapters[name] = centre.adapter
        done = self._answered(centre, adapters, [(name, batch)])
        rollouts = done.rollouts[0]
        texts = [at for at, place in enumerate(job["places"]) if place < job["shown"]]
        return {
            "digest": _digest(state),
            "outline": outlined(rollouts),
            "texts": [[at, in_full(rollouts[at])] for at in texts],
            "tokens": done.tokens,
        }

    def _looked(self, job: Message, files: Files) -> dict[str, Any]:
        """The guard's look at the centre."""
        state = self._at(job["generation"])
        reading = self._subject(job).reading(state.space.centre(state.master), state.generation)
        return {"digest": _digest(state), "reading": reading.to_json()}

    def _reached(self, job: Message, files: Files) -> dict[str, Any]:
        """How far the first member's noise alone moves what the model expects."""
        state = self._at(job["generation"])
        options = state.options
        made = state.space.perturb(
            state.master,
            state.seed,
            state.generation,
            2,
            options.antithetic,
            state.sigma_scale,
            1,
        )
        point = replace(made.centre, adapter=made.members[0])
        return {"digest": _digest(state), "divergence": self._subject(job).divergence(point)}

    def _served(self, job: Message, files: Files) -> dict[str, Any]:
        """Completions of the base, and of adapters that come with the message."""
        engine = self._bench.engine
        requests = [
            Request(prompt, adapter, Sampling(**{**sampling, "stop": tuple(sampling["stop"])}))
            for prompt, adapter, sampling in job["requests"]
        ]
        engine.set_base({})
        engine.load(loaded(job["adapters"], files))
        made = engine.generate(requests)
        engine.load({})
        return {"completions": [[c.text, c.tokens, c.finish_reason, c.error] for c in made]}

    def _answered(
        self,
        centre: Centre,
        adapters: Mapping[str, AdapterState],
        asked: Sequence[tuple[str | None, Batch]],
    ) -> Answered:
        return answered(self._bench.engine, Timings(), centre, adapters, asked)

    def _subject(self, job: Message) -> Looked:
        key = pack(job["prompts"]).hex()
        if key not in self._subjects:
            prompts = [
                Prompt(text, None if messages is None else tuple(messages), kind, good)
                for text, messages, kind, good in job["prompts"]
            ]
            self._subjects[key] = subject_of(self._bench.engine, prompts, self._config.seed)
        return self._subjects[key]

    def _at(self, generation: int) -> SearchState:
        """The state of a generation: the one it stands at, or the best before it."""
        if self._state is not None and self._state.generation == generation:
            return self._state
        if self._best is not None and self._best[0].generation == generation:
            return self._best[0]
        raise RuntimeError(f"asked for generation {generation}, which this actor does not hold")

    def _keep(self, only: Sequence[int], noise: Sequence[Floats] | None) -> None:
        """Hold on to noise for `tell`, as much as one process would of a whole population."""
        if noise is not None:
            room = NOISE_KEPT - sum(eps.size for eps in self._noise.values())
            for pair in only:
                room -= noise[pair].size
                if room >= 0:
                    self._noise[pair] = noise[pair]

    @staticmethod
    def _pairs(state: SearchState) -> int:
        return state.options.population // (2 if state.options.antithetic else 1)


def _digest(state: SearchState) -> str:
    return state.space.digest(state.master)


def _top(rollouts: Sequence[Rollout], beat: Sequence[float] | None, first: int) -> Any:
    """The best rollout and its place among all, if it beats the [reward, place] known so far."""
    at = max(range(len(rollouts)), key=lambda place: rollouts[place].score.reward)
    reward, place = rollouts[at].score.reward, first + at
    if beat is not None and (reward, -place) <= (beat[0], -beat[1]):
        return None
    return [place, in_full(rollouts[at])]
