"""What a search leaves behind: adapters, and in weights mode a merged model."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from loralab import durable
from loralab.adapters.state import AdapterState, Factors
from loralab.adapters.truncate import Truncation
from loralab.config import EvolveConfig
from loralab.evolution.journal import HeldOut
from loralab.evolution.replay import as_adapter, truncation_row
from loralab.evolution.strategy import SearchState
from loralab.evolution.weight_space import WeightSpace
from loralab.evolution.workbench import Workbench
from loralab.run import Run

_LOSS_WORTH_A_FINDING = 0.1


def save_point(
    state: SearchState, config: EvolveConfig, directory: Path
) -> tuple[AdapterState, Truncation | None]:
    """Save a state as an fp32 adapter; in weights mode the nearest one, and what it loses."""
    adapter, truncation = as_adapter(state, config)
    durable.publish(directory, adapter.save)
    return adapter, truncation


def save_merged(state: SearchState, bench: Workbench, directory: Path) -> None:
    """Write the model with the change added to its weights, which the engine holds afterwards."""
    assert isinstance(state.space, WeightSpace)
    bench.engine.set_base(state.space.change(state.master))
    draft = directory.with_name(f"{durable.TEMPORARY_PREFIX}{directory.name}")
    with durable.explain_os_errors(directory):
        shutil.rmtree(draft, ignore_errors=True)
        bench.save_model(draft)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(draft, directory)


def log_truncation(
    truncation: Truncation, scored: HeldOut | None, config: EvolveConfig, run: Run
) -> None:
    """Write `truncation.json` with the adapter's own held-out score, and a finding if far."""
    row = truncation_row(truncation)
    if scored is not None:
        row |= {"held_out_reward": scored.reward, "held_out_correct": scored.correct}
    run.write("adapter/truncation.json", json.dumps(row, indent=2) + "\n")
    if truncation.total > _LOSS_WORTH_A_FINDING:
        rank = config.adapter.rank
        run.log_finding(
            {
                "rule": "truncation",
                "what": f"the rank-{rank} adapter is off by {truncation.total:.0%} of the change",
                "why": "the sum of low-rank changes over generations has a higher rank",
                "advice": "use the model in merged/, or a larger adapter.rank",
            }
        )


def cast_adapter(adapter: AdapterState, dtype: torch.dtype) -> AdapterState:
    """The adapter as an engine runs it."""
    factors = {n: Factors(f.A.to(dtype), f.B.to(dtype)) for n, f in adapter.factors.items()}
    return replace(adapter, factors=factors)
