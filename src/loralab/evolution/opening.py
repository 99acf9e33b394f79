"""How a search begins, and how it goes on after a kill: from the journal alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from loralab.adapters.scale import WeightReport, analyse
from loralab.config import EvolveConfig
from loralab.durable import explain_os_errors
from loralab.environment import describe
from loralab.errors import UserError
from loralab.evolution.adapter_space import adapter_sigmas
from loralab.evolution.events import Notice, OnEvent
from loralab.evolution.journal import (
    Contents,
    DamagedHeader,
    Header,
    HeldOut,
    Journal,
    read,
)
from loralab.evolution.mending import mend_outputs, mended_start
from loralab.evolution.replay import first_state, states
from loralab.evolution.start import START, is_drawn, start_adapter
from loralab.evolution.strategy import SearchState
from loralab.evolution.weight_space import ROWS_COMPARED
from loralab.evolution.workbench import Workbench, fingerprint, sample_rows
from loralab.movable import differences
from loralab.rollouts import Rollout
from loralab.run import Run
from loralab.tasks.base import Task
from loralab.timings import Timings

_VERSIONS = ("loralab", "torch", "numpy", "python")


@dataclass(frozen=True)
class Best:
    """The point with the highest held-out reward so far, the earliest of equals.

    rollouts: its held-out answers, None if a session before this one measured it.
    """

    state: SearchState
    held_out: HeldOut
    rollouts: tuple[Rollout, ...] | None = None


@dataclass(frozen=True)
class Opened:
    """A search ready to go on. start: held-out score before generation 0, None until measured."""

    state: SearchState
    journal: Journal
    best: Best | None
    start: HeldOut | None


def open_search(
    config: EvolveConfig,
    run: Run,
    task: Task,
    bench: Workbench,
    timings: Timings,
    on_event: OnEvent,
) -> Opened:
    """Begin the run's search, or rebuild it from its journal if there is one.

    Raises:
        UserError: the journal was written with another config, model or kernel, or cannot be
            rebuilt to the bit.
    """
    model = fingerprint(bench.weights)
    rows = {name: sample_rows(weight, ROWS_COMPARED) for name, weight in bench.weights.items()}
    if run.journal_path.exists():
        with timings.phase("init_population"):
            return _resume(config, run, task, bench, model, rows, on_event)
    with timings.phase("weight_analysis"):
        report = analyse(bench.weights)
        _log_outliers(report, run, on_event)
    with timings.phase("init_population"):
        header, state = _first(config, run, task, bench, report, model, rows)
        return Opened(state, Journal.create(run.journal_path, header), None, None)


def _first(
    config: EvolveConfig,
    run: Run,
    task: Task,
    bench: Workbench,
    report: WeightReport,
    model: str,
    rows: Mapping[str, Tensor],
) -> tuple[Header, SearchState]:
    """A new header and the state it describes."""
    scale, adapter = config.evolution.scale, config.adapter
    shapes = {name: (w.shape[0], w.shape[1]) for name, w in bench.weights.items()}
    sigmas = report.perturbation(scale.granularity, scale.statistic, scale.fraction)
    if config.evolution.noise_on != "weights":
        if is_drawn(config):
            start = start_adapter(shapes, adapter.rank, adapter.alpha, config.seed, config.model)
        else:
            initialised = bench.initialise(config, task)
            with explain_os_errors(run.path):
                initialised.save(run.path / START)
            start = initialised.adapter
        on_a = config.evolution.noise_on == "AB"
        sigmas = adapter_sigmas(start, sigmas, on_a, scale.statistic, scale.fraction)
    machine = describe()
    header = Header(
        config=config.to_dict(),
        config_digest=config.digest(),
        seed=config.seed,
        shapes=shapes,
        sigmas={name: sigma.hex() for name, sigma in sigmas.items()},
        reward_floor=task.reward_floor,
        start="",
        model=model,
        kernel=bench.engine.kernel,
        versions={name: machine[name] for name in _VERSIONS},
    )
    state = first_state(header, run.path, rows)
    return replace(header, start=state.space.digest(state.master)), state


def _resume(
    config: EvolveConfig,
    run: Run,
    task: Task,
    bench: Workbench,
    model: str,
    rows: Mapping[str, Tensor],
    on_event: OnEvent,
) -> Opened:
    """The last state in the journal, every digest on the way to it checked."""
    for line in run.repaired:
        on_event(Notice(line))
    contents = _read(config, run, task, bench, model, rows)
    header = contents.header
    changed = differences(header.config, config.to_dict())
    if changed:
        raise UserError(
            f"{run.path} was started with another config: {', '.join(changed)}; restore the old "
            "values to resume, or start anew in another --run-dir"
        )
    if header.kernel != bench.engine.kernel:
        raise UserError(
            f"{run.path} was started with kernel {header.kernel!r}, this engine runs "
            f"{bench.engine.kernel!r}: the same adapter would write other text; resume where the "
            "first one runs, or start anew in another --run-dir"
        )
    if header.model != model:
        raise UserError(
            f"model {config.model!r} is not the one {run.path} was started with: its weights or "
            "modules differ; restore it to resume, or start anew in another --run-dir"
        )
    if contents.damage is not None:
        on_event(Notice(contents.damage))
        run.log_finding(
            {
                "rule": "damaged_journal",
                "what": contents.damage,
                "why": "the file changed after it was written",
                "advice": "the rest was kept in journal.damaged.jsonl and is run again",
            }
        )
    best: Best | None = None
    start: HeldOut | None = None
    state = mended_start(config, run, task, bench, header, rows, on_event)
    for point, entry in states(contents, state):
        state = point
        if entry is not None and entry.held_out is not None:
            start = start or entry.held_out
            best = better(best, state, entry.held_out)
    run.rewind(state.generation)
    mend_outputs(config, run, state, None if best is None else best.state, on_event)
    return Opened(state, Journal.resume(run.journal_path, contents), best, start)


def _read(
    config: EvolveConfig,
    run: Run,
    task: Task,
    bench: Workbench,
    model: str,
    rows: Mapping[str, Tensor],
) -> Contents:
    """The journal; a damaged header is made again as that of a new run would be."""
    try:
        return read(run.journal_path)
    except DamagedHeader:
        header, _ = _first(config, run, task, bench, analyse(bench.weights), model, rows)
        return read(run.journal_path, header)


def better(
    best: Best | None,
    state: SearchState,
    held_out: HeldOut,
    rollouts: tuple[Rollout, ...] | None = None,
) -> Best:
    """The better of the best so far and this state."""
    if best is not None and best.held_out.reward >= held_out.reward:
        return best
    return Best(state, held_out, rollouts)


def _log_outliers(report: WeightReport, run: Run, on_event: OnEvent) -> None:
    for outlier in report.outliers:
        run.log_finding(
            {
                "rule": "outlier_module",
                "what": str(outlier),
                "why": "with evolution.scale.granularity: layer it would set its layer's noise",
                "advice": "keep granularity: module",
            }
        )
    if report.outliers:
        on_event(Notice(f"{len(report.outliers)} modules are out of proportion, see findings"))
