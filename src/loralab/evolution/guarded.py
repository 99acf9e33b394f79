"""The guard of a search: each generation's numbers are judged, and now and then its centre's text.

The centre is the mean adapter: what the search would give if it ended now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, inf, isnan, nan, sqrt
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from loralab import tasks
from loralab.config import EvolveConfig
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.errors import UserError
from loralab.evolution.adapter_space import AdapterSpace
from loralab.evolution.centre import Looked, subject_of
from loralab.evolution.events import Notice, OnEvent
from loralab.evolution.space import Space
from loralab.evolution.strategy import SearchState
from loralab.evolution.workbench import Workbench
from loralab.health.canaries import rewards, shares, unearned
from loralab.health.ledger import Ledger
from loralab.health.population import dominance, population_values
from loralab.health.prompts import Prompt, as_prompts, shipped_prompts
from loralab.health.reading import Reading
from loralab.health.rules import judge
from loralab.health.telling import lines
from loralab.run import Run
from loralab.scoring import Scorer, scored
from loralab.tasks.base import Example, Score, Task

FIRST = (0, 1, 5, 10, 25, 50)
"""Generations before which the centre writes, beside the end."""
PROMPTS = 12
_EXAMPLES = 4
"""Training examples on which texts without merit are scored."""
_FACTS = ("es.unearned", "es.member_kl")
"""Measured once, before the first generation, and told again at each look."""


@runtime_checkable
class Elsewhere(Protocol):
    """An engine that looks at the search's points where they are: none is sent to it."""

    def looked(self, prompts: Sequence[Prompt], seed: int) -> Looked:
        """As `subject_of` gives it of an engine here."""
        ...


class SearchGuard:
    """Judges every generation. `guard: null` in the config makes one that does nothing."""

    def __init__(
        self,
        config: EvolveConfig,
        run: Run,
        bench: Workbench,
        space: Space,
        on_event: OnEvent,
        scorer: Scorer | None = None,
    ) -> None:
        """scorer: of the config's task, which a reward that hangs does not outlive."""
        self._config, self._wanted, self._scorer = config, config.guard, scorer
        self._run, self._bench, self._on_event = run, bench, on_event
        self._ledger = Ledger(run.path if self._wanted is not None else None)
        self._rows: list[Mapping[str, Any]] = []
        self._readings: list[Reading] = []
        self._standing: dict[str, set[tuple[str, str]]] = {}
        self._texts = self._wanted is not None
        self._facts: dict[str, float] | None = None
        self._last, self._from = -1, 0
        self._cost, self._spent = nan, 0.0
        self._began = perf_counter()
        self.stopping = False
        if self._wanted is None:
            return
        own = self._wanted.prompts
        prompts: tuple[Prompt, ...] = (
            shipped_prompts()[:PROMPTS] if own is None else as_prompts(own)
        )
        engine = bench.engine
        if isinstance(engine, Elsewhere):
            self._subject = engine.looked(prompts, config.seed)
        else:
            self._subject = subject_of(engine, prompts, config.seed)
            if not isinstance(engine, BatchedEngine):
                on_event(
                    Notice(
                        f"guard: {engine.kernel} tells no expectations: texts and the population's "
                        "numbers are looked at, the divergence from the base is not"
                    )
                )
        self._ratio = dominance(noise_ratios(space, bench.weights))

    def resume(self, generation: int) -> None:
        """Take up what was seen before a search goes on; of a new one forget what lies there."""
        if self._wanted is None:
            return
        self._readings = self._ledger.resume(generation)
        self._rows = [r for r in self._run.metrics() if r.get("generation", inf) < generation]
        self._last = self._readings[-1].step if self._readings else -1
        self._from = generation
        known = self._readings[-1].values if self._readings else {}
        self._facts = {name: known[name] for name in _FACTS if name in known} or None

    def before(self, state: SearchState) -> None:
        """Look at the centre of a state where it is time to, before its generation runs."""
        if self._wanted is not None and self._due(state.generation):
            self._look(state)

    def after(self, row: Mapping[str, Any]) -> None:
        """Judge a generation by its line of metrics, and those before it."""
        if self._wanted is None:
            return
        self._rows.append(row)
        values = population_values(self._rows) | {
            "es.dominance": self._ratio,
            "es.member_kl": (self._facts or {}).get("es.member_kl", nan),
            "train.step": float(row["generation"]) + 1,
        }
        self._judge([Reading(row["generation"], values, (), 0.0)])

    def end(self, state: SearchState) -> None:
        """The last look."""
        if self._wanted is not None and self._last < state.generation:
            self._look(state)

    def _due(self, generation: int) -> bool:
        assert self._wanted is not None
        if generation <= FIRST[-1]:
            return generation in FIRST and generation > self._last
        every = self._wanted.every
        if every is None:
            # Of this process alone: of an earlier one neither time is known.
            done = generation - self._from
            training = perf_counter() - self._began - self._spent
            known = done > 0 and not isnan(self._cost)
            every = ceil(self._cost * done / (self._wanted.budget * training)) if known else 1
        return generation - self._last >= every

    def _look(self, state: SearchState) -> None:
        began = perf_counter()
        reading = None
        try:
            if self._texts:
                seen = self._subject.reading(state.space.centre(state.master), state.generation)
                if self._facts is None:
                    self._facts = self._merit() | self._reach(state)
                values = {**seen.values, **self._facts, "train.step": float(state.generation)}
                reading = Reading(state.generation, values, seen.examples, perf_counter() - began)
        except Exception as error:
            # A guard ends no search: what it loaded is replaced before the next generation.
            named = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self._on_event(Notice(f"guard: looks at numbers alone: {named}{error}"))
            self._texts = False
        self._last = state.generation
        if reading is not None:
            self._readings.append(reading)
            self._ledger.add(reading)
            self._judge(self._readings)
        self._cost = perf_counter() - began
        self._spent += self._cost

    def _merit(self) -> dict[str, float]:
        """es.unearned: the most that a text without merit earns of what the gold answers do, over
        the least of all and the base; {} without gold answers."""
        task = tasks.get(self._config.task.name, **self._config.task.options)
        examples = task.examples("train")[:_EXAMPLES]
        if not examples:
            return {}
        scorer = self._scorer
        score = partial(_score, task) if scorer is None else partial(scorer.one, "train")
        earned = unearned(task, examples, score, task.prompt)
        sampling = Sampling(self._config.generation.max_new_tokens)
        engine = self._bench.engine
        engine.set_base({})
        made = engine.generate([Request(task.prompt(one), None, sampling) for one in examples])
        base = rewards(task, score, examples, [one.text for one in made])
        found = [share for share in shares(earned, base).values() if not isnan(share)]
        return {"es.unearned": max(found)} if found else {}

    def _reach(self, state: SearchState) -> dict[str, float]:
        """es.member_kl: how far from the base the first member's noise alone moves what the model
        expects, in nats a token; {} where that cannot be read, or of a centre that has moved."""
        if state.generation > 0:
            return {}
        options = state.options
        made = state.space.perturb(
            state.master, state.seed, 0, 2, options.antithetic, state.sigma_scale, 1
        )
        kl = self._subject.divergence(replace(made.centre, adapter=made.members[0]))
        return {} if isnan(kl) else {"es.member_kl": kl}

    def _judge(self, readings: Sequence[Reading]) -> None:
        found = judge(readings)
        # A generation's numbers say nothing of its texts, nor the other way round.
        about = "texts" if "text.length" in readings[-1].values else "numbers"
        known = self._standing.get(about, set())
        fresh = [one for one in found if (one.rule, one.severity) not in known]
        self._standing[about] = {(one.rule, one.severity) for one in found}
        self._ledger.report(fresh)
        for one in fresh:
            for line in lines(one, "generation"):
                self._on_event(Notice(line))
        assert self._wanted is not None
        if self._wanted.action == "stop" and any(one.severity == "fail" for one in found):
            self.stopping = True


def _score(task: Task, example: Example, text: str) -> Score:
    """As `Scorer.one`, in this process: whatever the reward raises is an error."""
    found = scored(task, example, text)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def noise_ratios(space: Space, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """RMS of the change that a member's noise on B makes to W over the mean |W|, by module.

    dW = scaling N A with N (out, r) of variance sigma^2 has the RMS scaling sigma ||A|| / sqrt in;
    in a search over weights sigma is the RMS itself.
    """
    ratios = {}
    for name, weight in weights.items():
        if isinstance(space, AdapterSpace):
            a = space.start_adapter.factors[name].A.double()
            scaling = abs(space.start_adapter.scaling)
            change = space.sigmas[f"{name}.B"] * scaling * float(a.norm()) / sqrt(a.shape[1])
        else:
            change = space.sigmas[name]
        size = float(weight.float().abs().mean())
        ratios[name] = change / size if size > 0 else inf
    return ratios
