"""Where members meet prompts: generated for by an engine, judged by the task.

An arena is here (`LocalArena`: one batched decode for a whole population) or on other machines
(`loralab.evolution.cluster`); the trainer does not know which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from time import perf_counter
from typing import Protocol

import torch

from loralab.adapters.state import AdapterState
from loralab.config import EvolveConfig
from loralab.config.evolve import ScoringConfig
from loralab.engines.base import Progress
from loralab.errors import UserError
from loralab.evolution.events import Generating, OnEvent
from loralab.evolution.shaping import Fitness
from loralab.evolution.space import Centre
from loralab.evolution.strategy import Population, SearchState, ask
from loralab.evolution.subsets import fixed_subset, window
from loralab.evolution.workbench import PopulationEngine
from loralab.rollouts import Batch, Rollout
from loralab.scoring import Scorer
from loralab.tasks.base import Example, Split, Task
from loralab.timings import Timings

SHOWN_DURING = 8
"""Held-out answers written down each time; before and after, all of them are."""


def shown(generation: int) -> int | None:
    """How many held-out answers of a generation are written down, None for all of them."""
    return None if generation == 0 else SHOWN_DURING


@dataclass(frozen=True)
class Answers:
    """What a population answered.

    population: as `ask` gave it; of members that are elsewhere, what `tell` and the log need.
    members: by member, one rollout a prompt. centre: held-out answers of the unperturbed point,
    () where it was not asked. top: the rollout of a member with the highest reward, the first of
    equals. tokens: generated in all, in `seconds` of generating. whole: False where the texts of
    `members`, and those of `centre` that are not shown, are stand-ins, equal where the texts are.
    """

    population: Population
    members: tuple[tuple[Rollout, ...], ...]
    centre: tuple[Rollout, ...]
    top: Rollout
    tokens: int
    seconds: float
    whole: bool = True

    @property
    def everything(self) -> list[Rollout]:
        """All members' rollouts."""
        return [rollout for row in self.members for rollout in row]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Arena(Protocol):
    """Generates and judges for the points of one search."""

    def meet(self, state: SearchState, test: bool) -> Answers:
        """A state's population on its generation's prompts, and if `test` its centre on the
        held-out ones."""
        ...

    def advance(self, fitness: Fitness) -> None:
        """What the generation just met came to, before this process tells its own state."""
        ...

    def test(self, state: SearchState, saved: AdapterState | None = None) -> tuple[Rollout, ...]:
        """The held-out answers of a state's centre; of `saved` instead, the adapter that is saved
        of that state, in the model's dtype on the true base."""
        ...

    def figures(self) -> Mapping[str, float]:
        """What the arena adds to the generation's line of metrics."""
        ...


class Examples:
    """The task's examples, as a search walks through them. scorer: as `Batch` has it."""

    def __init__(self, config: EvolveConfig, task: Task, scorer: Scorer | None = None) -> None:
        self._config = config
        self._task = task
        self._scorer = scorer
        self._train = task.examples("train")
        if not self._train:
            raise UserError(f"task {task.name!r} has no training examples")
        self._test = task.examples("test")
        chosen = fixed_subset(len(self._test), config.evolution.test_samples, config.seed)
        self.held_out = self._batch("test", [self._test[i] for i in chosen], str(config.seed))

    def indices(self, generation: int) -> tuple[int, ...]:
        """Training examples of a generation."""
        return window(generation, self._config.evolution.samples_per_generation, len(self._train))

    def training(self, generation: int, indices: Sequence[int] | None = None) -> Batch:
        """The prompts of a generation, or those of these training examples in it."""
        chosen = self.indices(generation) if indices is None else indices
        examples = [self._train[i] for i in chosen]
        return self._batch("train", examples, f"{self._config.seed}|{generation}")

    def _batch(self, split: Split, examples: Sequence[Example], key: str) -> Batch:
        settings = self._config.generation
        return Batch(self._task, split, tuple(examples), settings, key, self._scorer)


def scorer_of(config: EvolveConfig) -> Scorer:
    """Processes that score the config's task, with a deadline; to be closed."""
    scoring = config.scoring or ScoringConfig()
    return Scorer(config.task.name, config.task.options, scoring.deadline, scoring.workers)


@dataclass(frozen=True)
class Answered:
    """One call of the engine. rollouts: of each who was asked, in their order."""

    rollouts: tuple[tuple[Rollout, ...], ...]
    tokens: int
    seconds: float


def answered(
    engine: PopulationEngine,
    timings: Timings,
    centre: Centre,
    adapters: Mapping[str, AdapterState],
    asked: Sequence[tuple[str | None, Batch]],
    progress: Progress | None = None,
) -> Answered:
    """Load adapters on the centre's base weights, generate for all in one batch, and judge.

    asked: the adapter's name (None is the base) and its prompts. The engine holds no adapter
    afterwards.
    """
    requests = [request for name, batch in asked for request in batch.requests(name)]
    with timings.phase("loading"):
        engine.set_base(centre.change or {})
        engine.load(adapters)
    with timings.phase("evaluation"):
        began = perf_counter()
        completions = engine.generate(requests, progress)
        seconds = perf_counter() - began
        rollouts, at = list[tuple[Rollout, ...]](), 0
        for batch, who in _by_batch(asked):
            size = len(batch.examples)
            judged = batch.judge(completions[at : at + who * size])
            rollouts += [tuple(judged[one * size : (one + 1) * size]) for one in range(who)]
            at += who * size
    with timings.phase("unloading"):
        engine.load({})
    return Answered(tuple(rollouts), sum(len(c.tokens) for c in completions), seconds)


def _by_batch(asked: Sequence[tuple[str | None, Batch]]) -> Iterator[tuple[Batch, int]]:
    """Batches with how many in a row are asked them: one scorer call for a whole population."""
    for _, group in groupby(asked, key=lambda one: id(one[1])):
        same = [batch for _, batch in group]
        yield same[0], len(same)


def member_name(generation: int, member: int) -> str:
    """An adapter's name, used once in a run: engines cache by it."""
    return f"g{generation}-m{member}"


def centre_name(generation: int) -> str:
    """The name of a generation's unperturbed adapter."""
    return f"g{generation}-centre"


class LocalArena:
    """The engine of this process."""

    def __init__(
        self, examples: Examples, engine: PopulationEngine, timings: Timings, on_event: OnEvent
    ) -> None:
        self._examples = examples
        self._engine = engine
        self._timings = timings
        self._on_event = on_event

    def meet(self, state: SearchState, test: bool) -> Answers:
        generation, held_out = state.generation, self._examples.held_out
        with self._timings.phase("create_loras"):
            population = ask(state, threads=torch.get_num_threads())
        perturbed = population.perturbed
        batch = self._examples.training(generation)
        names = [member_name(generation, i) for i in range(len(perturbed.members))]
        adapters = dict(zip(names, perturbed.members, strict=True))
        asked: list[tuple[str | None, Batch]] = [(name, batch) for name in names]
        if test:
            asked.append((self._put(adapters, perturbed.centre, generation), held_out))
        done = answered(
            self._engine, self._timings, perturbed.centre, adapters, asked, self._told(generation)
        )
        members = done.rollouts[: len(names)]
        top = max((r for row in members for r in row), key=lambda rollout: rollout.score.reward)
        centre = done.rollouts[-1] if test else ()
        return Answers(population, members, centre, top, done.tokens, done.seconds)

    def advance(self, fitness: Fitness) -> None:
        """Nobody else has to know."""

    def test(self, state: SearchState, saved: AdapterState | None = None) -> tuple[Rollout, ...]:
        held_out = self._examples.held_out
        if not held_out.examples:
            return ()
        centre = state.space.centre(state.master) if saved is None else Centre(saved)
        adapters: dict[str, AdapterState] = {}
        name = self._put(adapters, centre, state.generation)
        told = self._told(state.generation)
        asked = [(name, held_out)]
        done = answered(self._engine, self._timings, centre, adapters, asked, told)
        return done.rollouts[0]

    def figures(self) -> Mapping[str, float]:
        return {}

    def _put(
        self, adapters: dict[str, AdapterState], centre: Centre, generation: int
    ) -> str | None:
        """Put the centre among the adapters; its name, None where it has none."""
        if centre.adapter is None:
            return None
        name = centre_name(generation)
        adapters[name] = centre.adapter
        return name

    def _told(self, generation: int) -> Progress:
        return lambda done, of: self._on_event(Generating(generation, done, of))
