"""What a resumed search finds damaged beside its journal, and makes again: its start, its adapters.

The journal has a digest for each of them, so that what is made again is known to be the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from loralab.adapters.state import AdapterState
from loralab.config import EvolveConfig
from loralab.durable import explain_os_errors
from loralab.errors import UserError
from loralab.evolution.events import Notice, OnEvent
from loralab.evolution.journal import Header
from loralab.evolution.outputs import save_point
from loralab.evolution.replay import first_state
from loralab.evolution.start import START, is_drawn
from loralab.evolution.strategy import SearchState
from loralab.evolution.workbench import Workbench
from loralab.run import Run
from loralab.tasks.base import Task


def mended_start(
    config: EvolveConfig,
    run: Run,
    task: Task,
    bench: Workbench,
    header: Header,
    rows: Mapping[str, Tensor],
    on_event: OnEvent,
) -> SearchState:
    """The state before generation 0; a start that was initialised and is damaged is initialised
    again. It is for the caller to compare digests of one that is drawn.

    Raises:
        UserError: it comes out another way than it did.
    """
    kept = config.evolution.noise_on != "weights" and not is_drawn(config)
    why = "its digest is not the journal's"
    try:
        state = first_state(header, run.path, rows)
        if not kept or _digest(state) == header.start:
            return state
    except UserError as error:
        if not kept:
            raise
        why = str(error)
    folder = run.path / START
    aside = folder.with_suffix(".damaged")
    with explain_os_errors(folder):
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
        bench.initialise(config, task).save(folder)
    state = first_state(header, run.path, rows)
    init = config.adapter.init.name
    if _digest(state) != header.start:
        raise UserError(
            f"{folder} is damaged ({why}), and adapter.init {init} now makes another start: "
            "restore the folder from a copy, or start anew in another --run-dir"
        )
    what = f"{folder} was damaged ({why}); {init} made it again, with the digest in the journal"
    on_event(Notice(what))
    run.log_finding(
        {
            "rule": "damaged_start",
            "what": what,
            "why": "the files changed after they were written",
            "advice": f"look at the disk; they are kept in {aside.name}",
        }
    )
    return state


def mend_outputs(
    config: EvolveConfig,
    run: Run,
    last: SearchState,
    best: SearchState | None,
    on_event: OnEvent,
) -> None:
    """Write the adapter of the best point anew where it is not the journal's; say so where that of
    a finished run's last point is not, which the end of the run writes anew.

    A run that was killed between an adapter and its line in the journal is told the same: its
    adapter is a generation ahead.
    """
    if config.evolution.noise_on == "weights":
        return  # these are made at the end alone
    if best is not None:
        # The last point is measured after the last line: it may be the best, and then is there.
        ended = last.generation == config.evolution.generations
        why = _difference(run.adapter, *([best, last] if ended else [best]))
        if why is not None:
            save_point(best, config, run.adapter)
            on_event(Notice(f"{run.adapter}: {why}; written anew from the journal"))
    final = run.checkpoints / "final"
    if final.exists():
        why = _difference(final, last)
        if why is not None:
            on_event(Notice(f"{final}: {why}; it is written anew from the journal"))


def _difference(folder: Path, *states: SearchState) -> str | None:
    """Why an adapter on disk is that of none of these states, None where it is."""
    try:
        digest = AdapterState.load(folder).digest()
    except (OSError, UserError) as error:
        return f"cannot be used ({error})"
    if digest in map(_digest, states):
        return None
    return f"its digest is not that of generation {states[0].generation}"


def _digest(state: SearchState) -> str:
    return state.space.digest(state.master)
