"""Where members meet prompts: one batched decode for a whole population, judged by the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from loralab.config import EvolveConfig
from loralab.engines.base import Completion, Request
from loralab.errors import UserError
from loralab.evolution.events import Generating, OnEvent
from loralab.evolution.space import Centre, Perturbed
from loralab.evolution.subsets import fixed_subset, window
from loralab.evolution.workbench import PopulationEngine
from loralab.rollouts import Batch, Rollout
from loralab.tasks.base import Example, Split, Task
from loralab.timings import Timings


@dataclass(frozen=True)
class Answers:
    """What a population answered.

    members: by member, one rollout a prompt. centre: held-out answers of the unperturbed point,
    () where it was not asked. tokens: generated in all, in `seconds` of generating.
    """

    members: tuple[tuple[Rollout, ...], ...]
    centre: tuple[Rollout, ...]
    tokens: int
    seconds: float

    @property
    def everything(self) -> list[Rollout]:
        """All members' rollouts."""
        return [rollout for row in self.members for rollout in row]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Arena:
    """The engine, the task's examples, and the clock over both."""

    def __init__(
        self,
        config: EvolveConfig,
        task: Task,
        engine: PopulationEngine,
        timings: Timings,
        on_event: OnEvent,
    ) -> None:
        self._config = config
        self._task = task
        self._engine = engine
        self._timings = timings
        self._on_event = on_event
        self._train = task.examples("train")
        if not self._train:
            raise UserError(f"task {task.name!r} has no training examples")
        test = task.examples("test")
        chosen = fixed_subset(len(test), config.evolution.test_samples, config.seed)
        self.held_out = self._batch("test", [test[i] for i in chosen], str(config.seed))

    def indices(self, generation: int) -> tuple[int, ...]:
        """Training examples of a generation."""
        return window(generation, self._config.evolution.samples_per_generation, len(self._train))

    def training(self, generation: int) -> Batch:
        """The prompts of a generation."""
        examples = [self._train[i] for i in self.indices(generation)]
        return self._batch("train", examples, f"{self._config.seed}|{generation}")

    def meet(self, perturbed: Perturbed, batch: Batch, generation: int, test: bool) -> Answers:
        """Every member on the batch, and if `test` the centre on the held-out prompts with them."""
        names = [f"g{generation}-m{i}" for i in range(len(perturbed.members))]
        adapters = dict(zip(names, perturbed.members, strict=True))
        requests = [request for name in names for request in batch.requests(name)]
        if test:
            centre = perturbed.centre.adapter
            name = None if centre is None else f"g{generation}-centre"
            if name is not None and centre is not None:
                adapters[name] = centre
            requests += self.held_out.requests(name)
        with self._timings.phase("loading"):
            self._engine.set_base(perturbed.centre.change or {})
            self._engine.load(adapters)
        with self._timings.phase("evaluation"):
            began = perf_counter()
            completions = self._generate(requests, generation)
            seconds = perf_counter() - began
            size = len(batch.examples)
            members = tuple(
                tuple(batch.judge(completions[at * size : (at + 1) * size]))
                for at in range(len(names))
            )
            tested = tuple(self.held_out.judge(completions[len(names) * size :])) if test else ()
        with self._timings.phase("unloading"):
            self._engine.load({})
        return Answers(members, tested, sum(len(c.tokens) for c in completions), seconds)

    def test(self, centre: Centre, generation: int) -> tuple[Rollout, ...]:
        """The held-out answers of one point."""
        if not self.held_out.examples:
            return ()
        name = None if centre.adapter is None else f"g{generation}-centre"
        with self._timings.phase("loading"):
            self._engine.set_base(centre.change or {})
            if name is not None and centre.adapter is not None:
                self._engine.load({name: centre.adapter})
        with self._timings.phase("evaluation"):
            completions = self._generate(self.held_out.requests(name), generation)
            rollouts = tuple(self.held_out.judge(completions))
        with self._timings.phase("unloading"):
            self._engine.load({})
        return rollouts

    def _generate(self, requests: Sequence[Request], generation: int) -> list[Completion]:
        return self._engine.generate(
            requests, lambda done, of: self._on_event(Generating(generation, done, of))
        )

    def _batch(self, split: Split, examples: Sequence[Example], key: str) -> Batch:
        return Batch(self._task, split, tuple(examples), self._config.generation, key)
