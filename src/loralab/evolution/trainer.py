"""Evolve an adapter on a task's reward: ask, generate, score, tell, write down, again.

What a run is worth lies in its journal, whose line is the last thing a generation writes: a kill
at any moment loses at most the generation in flight, and a resumed run ends in the same bits.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter

from loralab import tasks
from loralab.config import EvolveConfig
from loralab.evolution.arena import Arena, Examples, LocalArena, scorer_of, shown
from loralab.evolution.cluster.arena import ClusterArena
from loralab.evolution.cluster.opening import open_site
from loralab.evolution.events import Finished, Notice, OnEvent, Started, ignore
from loralab.evolution.guarded import SearchGuard
from loralab.evolution.journal import Entry, HeldOut
from loralab.evolution.measures import (
    generation_done,
    generation_row,
    held_out_row,
    reward_table,
    score_of,
)
from loralab.evolution.opening import Best, better, open_search
from loralab.evolution.opening_engines import open_workbench
from loralab.evolution.outputs import cast_adapter, log_truncation, save_merged, save_point
from loralab.evolution.shaping import mean_over_prompts
from loralab.evolution.strategy import SearchState, tell
from loralab.evolution.workbench import Open, Workbench
from loralab.health.population import generation_shares
from loralab.interrupt import Interrupt
from loralab.rollouts import completion_rows, refuse_failures
from loralab.run import Run
from loralab.timings import Timings


@dataclass(frozen=True)
class Result:
    """How a search went.

    complete: False if it stopped at a signal. generations: done in all. start, best, final:
    held-out scores of the unperturbed adapter before generation 0, at its best, at the end.
    digest: of the last point. adapter: the directory with the best one. truncation_error: in
    weights mode, the relative error of that adapter against the change of the weights.
    """

    complete: bool
    generations: int
    start: HeldOut | None
    best: HeldOut | None
    best_generation: int | None
    final: HeldOut | None
    digest: str
    adapter: Path
    truncation_error: float | None = None


def evolve(
    config: EvolveConfig,
    run: Run,
    on_event: OnEvent = ignore,
    open_workbench: Open = open_workbench,
) -> Result:
    """Run the search of a config in a run directory, or go on with the one that is there.

    Raises:
        UserError: something the user can mend; the run can be resumed afterwards.
    """
    options, seconds_here = config.evolution, list[float]()
    timings = Timings.load(run.timings_path)

    def stopping(name: str) -> None:
        on_event(Notice(f"{name}: stopping after the generation in flight; again to stop at once"))

    with ExitStack() as until_end:
        interrupt = until_end.enter_context(Interrupt(stopping))
        until_end.enter_context(timings.phase("total_experiment"))
        task = tasks.get(config.task.name, **config.task.options)
        with timings.phase("server_launch"):
            site = None
            if config.cluster is not None:
                site = until_end.enter_context(open_site(config, open_workbench, on_event))
            bench = open_workbench(config) if site is None else site.bench
        until_end.callback(bench.close)
        run.note(kernel=bench.engine.kernel)
        scorer, most_failed = None, 1.0
        if config.scoring is not None:
            scorer = until_end.enter_context(scorer_of(config))
            most_failed = config.scoring.max_failed
        examples = Examples(config, task, scorer)
        search = open_search(config, run, task, bench, timings, on_event)
        state, journal, best, start = search.state, search.journal, search.best, search.start
        arena: Arena = (
            LocalArena(examples, bench.engine, timings, on_event)
            if site is None
            else ClusterArena(site.fleet, examples, config, run, timings, on_event)
        )
        if site is not None and scorer is None and config.guard is not None:
            # As beside actors: a reward that hangs costs its own text. They start when asked.
            scorer = until_end.enter_context(scorer_of(config))
        guard = SearchGuard(config, run, bench, state.space, on_event, scorer)
        guard.resume(state.generation)
        on_event(
            Started(
                model=config.model,
                task=task.name,
                kernel=bench.engine.kernel,
                generations=options.generations,
                members=options.population,
                prompts=len(examples.indices(0)),
                resumed_at=state.generation or None,
            )
        )

        while state.generation < options.generations and not interrupt.requested:
            guard.before(state)
            if guard.stopping:
                break
            began, generation = perf_counter(), state.generation
            testing = bool(examples.held_out.examples) and generation % options.eval_every == 0

            answers = arena.meet(state, testing)
            judged = [*answers.everything, *answers.centre]
            refuse_failures(judged, most_failed, f"generation {generation}")
            with timings.phase("es_update"):
                rewards = reward_table(answers.members)
                means = tuple(mean_over_prompts(rewards))
                by_prompt = tuple(map(tuple, rewards.tolist()))
                fitness = by_prompt if options.per_prompt_baseline else means
                arena.advance(fitness)
                after = tell(state, answers.population, fitness)
                digest = after.space.digest(after.master)

            held_out = score_of(answers.centre)
            if held_out is not None:
                start = start or held_out
                kept = answers.centre if answers.whole else None
                best = better(best, state, held_out, kept)
                if best.state is state and options.noise_on != "weights":
                    save_point(state, config, run.adapter)

            seconds = perf_counter() - began
            seconds_here.append(seconds)
            row = generation_row(state, after, answers.population, answers, means, seconds)
            row |= held_out_row(held_out, answers.centre, best)
            texts = [[rollout.text for rollout in member] for member in answers.members]
            row |= generation_shares(by_prompt, texts, options.antithetic)
            row |= arena.figures()
            top, tested = answers.top, answers.centre[: shown(generation)]
            phase = "before" if generation == 0 else "during"
            run.log_completions(
                completion_rows(examples.training(generation), [top], generation, "during")
                + completion_rows(examples.held_out, tested, generation, phase)
            )
            run.log_metrics(row)
            timings.save(run.timings_path)
            journal.append(
                Entry(generation, examples.indices(generation), fitness, digest, held_out)
            )
            state = after
            guard.after(row)
            del answers  # or two generations' members would be held at once
            time_left = fmean(seconds_here) * (options.generations - state.generation)
            on_event(generation_done(row, options.generations, top, best, time_left))

        complete = state.generation == options.generations
        final = None
        if complete:
            guard.end(state)
            last = arena.test(state)
            final = score_of(last)
            if final is not None:
                best = better(best, state, final, last)
                row = held_out_row(final, last, best)
                run.log_metrics({"generation": state.generation, **row})
        error = None
        if complete:
            error = _finish(config, run, bench, examples, arena, state, best)
        elif best is None and options.noise_on != "weights":
            save_point(state, config, run.adapter)
        digest = state.space.digest(state.master)
    timings.save(run.timings_path)
    on_event(Finished(complete, state.generation))
    return Result(
        complete=complete,
        generations=state.generation,
        start=start,
        best=None if best is None else best.held_out,
        best_generation=None if best is None else best.state.generation,
        final=final,
        digest=digest,
        adapter=run.adapter,
        truncation_error=error,
    )


def _finish(
    config: EvolveConfig,
    run: Run,
    bench: Workbench,
    examples: Examples,
    arena: Arena,
    state: SearchState,
    best: Best | None,
) -> float | None:
    """Write what the best point answers, and the best and the last adapter.

    In weights mode: the model with the best change merged, and the adapter nearest to it, whose
    relative error is returned. The last change can be had by replay.
    """
    kept = state if best is None else best.state
    if examples.held_out.examples:
        answers = None if best is None else best.rollouts
        if answers is None:  # measured before a resume, or without all its texts
            answers = arena.test(kept)
        run.log_completions(completion_rows(examples.held_out, answers, kept.generation, "after"))
    adapter, truncation = save_point(kept, config, run.adapter)
    if truncation is None:
        save_point(state, config, run.checkpoints / "final")
        return None
    save_merged(kept, bench, run.path / "merged")
    saved = cast_adapter(adapter, next(iter(bench.weights.values())).dtype)
    log_truncation(truncation, score_of(arena.test(kept, saved)), config, run)
    return truncation.total
