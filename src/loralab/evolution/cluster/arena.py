"""A generation as jobs: units of antithetic pairs, and pieces of the held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from loralab.adapters.state import AdapterState
from loralab.config import EvolveConfig
from loralab.environment import describe
from loralab.errors import UserError
from loralab.evolution.arena import Answers, Examples, shown
from loralab.evolution.cluster.fleet import Fleet, Job
from loralab.evolution.cluster.messages import Message, compact, restored, stand_ins
from loralab.evolution.events import Generating, OnEvent
from loralab.evolution.journal import read
from loralab.evolution.noise import pairs
from loralab.evolution.shaping import Fitness
from loralab.evolution.space import Centre, Perturbed
from loralab.evolution.start import START
from loralab.evolution.strategy import Population, SearchState, weights_of
from loralab.rollouts import Rollout
from loralab.run import Run
from loralab.timings import Timings


class ClusterArena:
    """Has a fleet generate and judge, in jobs of so many antithetic pairs (draws).

    A job is generated for alone, in its own batch, so its answers do not depend on who does it or
    on how many there are.
    """

    def __init__(
        self,
        fleet: Fleet,
        examples: Examples,
        config: EvolveConfig,
        run: Run,
        timings: Timings,
        on_event: OnEvent,
    ) -> None:
        self._fleet, self._examples = fleet, examples
        assert config.cluster is not None
        self._pairs_per_unit = config.cluster.pairs_per_unit
        self._timings, self._on_event = timings, on_event
        self._held_out = examples.held_out.examples
        self._met = 0
        self._score: float | None = None
        self._counted = (0, 0, 0, 0)
        contents = read(run.journal_path)
        self._options, self._floor = config.evolution, contents.header.reward_floor
        entries = [
            self._entry(e.generation, e.fitness, None if e.held_out is None else e.held_out.reward)
            for e in contents.entries
        ]
        fleet.begin({"header": asdict(contents.header)}, files_under(run.path / START), entries)

    def meet(self, state: SearchState, test: bool) -> Answers:
        began, generation, options = perf_counter(), state.generation, state.options
        batch = self._examples.training(generation)
        size, count = len(batch.examples), pairs(options.population, options.antithetic)
        step = self._pairs_per_unit
        units = [range(at, min(at + step, count)) for at in range(0, count, step)]
        tests = self._tests(state, shown(generation)) if test else []
        total = options.population * size + (len(self._held_out) if test else 0)
        following = _Following(state, total, self._on_event)
        jobs: list[Job] = list(tests)
        for unit in units:
            row = {"kind": "unit", "generation": generation, "pairs": list(unit)}
            jobs.append(following.unit({**row, "indices": self._examples.indices(generation)}))
        with self._timings.phase("evaluation"):
            answers = self._fleet.run(jobs, following.heard)
        of_tests, of_units = answers[: len(tests)], answers[len(tests) :]
        prompts = [batch.task.prompt(example) for example in batch.examples]
        members: list[tuple[Rollout, ...]] = []
        for answer in of_units:
            times = len(answer["outline"]["correct"]) // size
            judged = stand_ins(answer["outline"], batch.examples * times, prompts * times)
            members += [tuple(judged[at : at + size]) for at in range(0, len(judged), size)]
        centre = self._joined(of_tests) if test else ()
        self._met = generation
        self._score = fmean(r.score.reward for r in centre) if centre else None
        assert following.top is not None
        place, top = following.top
        unchanged = [a["unchanged_share"] for a in of_units if a["unchanged_share"] is not None]
        made = Perturbed(Centre(None), (), None, fmean(unchanged) if unchanged else None)
        return Answers(
            population=Population(generation, made),
            members=tuple(members),
            centre=centre,
            top=restored(top, batch.examples[place % size], prompts[place % size]),
            tokens=sum(answer["tokens"] for answer in answers),
            seconds=perf_counter() - began,
            whole=False,
        )

    def advance(self, fitness: Fitness) -> None:
        """Actors tell their states while this process tells its own."""
        self._fleet.advance(self._entry(self._met, fitness, self._score))

    def test(self, state: SearchState, saved: AdapterState | None = None) -> tuple[Rollout, ...]:
        """As `Arena.test`; actors make what is saved of the state themselves."""
        if not self._held_out:
            return ()
        jobs = self._tests(state, None, saved is not None)
        following = _Following(state, len(self._held_out), self._on_event)
        with self._timings.phase("evaluation"):
            return self._joined(self._fleet.run(jobs, following.heard))

    def figures(self) -> Mapping[str, float]:
        """Bytes sent and received since the last call, for the search and for actors that start;
        the actors there are; jobs done once more since."""
        traffic, before = self._fleet.traffic, self._counted
        setup = traffic.setup_sent + traffic.setup_received
        self._counted = (traffic.sent, traffic.received, setup, self._fleet.again)
        names = ("sent_bytes", "received_bytes", "setup_bytes", "jobs_again")
        since = (now - then for now, then in zip(self._counted, before, strict=True))
        return {**dict(zip(names, since, strict=True)), "actors": self._fleet.present}

    def _entry(self, generation: int, fitness: Fitness, held_out: float | None) -> Message:
        """What a generation came to, as little as a state needs of it."""
        weights = compact(weights_of(fitness, self._options, self._floor))
        return {"generation": generation, "weights": weights, "held_out": held_out}

    def _tests(self, state: SearchState, limit: int | None, saved: bool = False) -> list[Job]:
        """The held-out prompts in pieces of a unit's rows; texts of the first `limit` are sent."""
        options, total = state.options, len(self._held_out)
        members = self._pairs_per_unit * (2 if options.antithetic else 1)
        rows = members * len(self._examples.indices(state.generation))
        row = {"kind": "test", "generation": state.generation, "saved": saved}
        row["shown"] = total if limit is None else limit
        pieces = [list(range(at, min(at + rows, total))) for at in range(0, total, rows)]
        return [_piece_of(row, piece) for piece in pieces]

    def _joined(self, answers: Sequence[Mapping[str, Any]]) -> tuple[Rollout, ...]:
        """Held-out rollouts, put together from their pieces."""
        batch, rollouts = self._examples.held_out, list[Rollout]()
        for answer in answers:
            at = len(rollouts)
            examples = batch.examples[at : at + len(answer["outline"]["correct"])]
            prompts = [batch.task.prompt(example) for example in examples]
            rollouts += stand_ins(answer["outline"], examples, prompts)
            for place, text in answer["texts"]:
                rollouts[at + place] = restored(text, examples[place], prompts[place])
        return tuple(rollouts)


class _Following:
    """The answers of one state's jobs as they come: checked, counted, and the best rollout kept."""

    def __init__(self, state: SearchState, total: int, on_event: OnEvent) -> None:
        self._generation, self._total, self._on_event = state.generation, total, on_event
        self._digest = state.space.digest(state.master)
        self._done = 0
        self.top: tuple[int, dict[str, Any]] | None = None
        """Place among all the members' rollouts, and the rollout in full."""

    def unit(self, message: Message) -> Job:
        """A unit that answers with the text of its best rollout if that beats what is known."""
        return lambda: ({**message, "beat": self._beat}, {})

    def heard(self, _: int, answer: dict[str, Any]) -> None:
        """Take an answer. Raises UserError if it was worked out from another point."""
        if answer["digest"] != self._digest:
            here = describe()
            there = answer["versions"]
            differ = ", ".join(f"{k} {v}, here {here[k]}" for k, v in there.items()
                               if k in here and here[k] != v)  # fmt: skip
            raise UserError(
                f"{answer['by']} works out another point for generation {self._generation} than "
                f"this process ({differ or 'the same versions'}): every node needs the same "
                "library versions and kind of CPU; mend that, then continue with --resume"
            )
        self._done += len(answer["outline"]["correct"])
        found = answer.get("top")
        if found is not None:
            place, rollout = found
            beat = self._beat
            if beat is None or (rollout["reward"], -place) > (beat[0], -beat[1]):
                self.top = (place, rollout)
        self._on_event(Generating(self._generation, self._done, self._total))

    @property
    def _beat(self) -> tuple[float, int] | None:
        return None if self.top is None else (self.top[1]["reward"], self.top[0])


def files_under(folder: Path) -> dict[str, bytes]:
    """Contents by path within a folder; {} where there is none."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _piece_of(row: Message, places: Sequence[int]) -> Job:
    return lambda: ({**row, "places": places}, {})
