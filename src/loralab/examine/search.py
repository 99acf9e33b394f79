"""A search before it starts: what its noise does to the weights, to what members write, to memory.

Four members of the first generation answer a few training prompts beside the centre. They are the
search's own: same start, same noise, same engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, median, pstdev
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loralab import durable
from loralab.adapters.attach import targeted_weights
from loralab.adapters.state import AdapterState
from loralab.config import EvolveConfig
from loralab.engines.batched import BatchedEngine
from loralab.errors import UserError
from loralab.evolution.events import ignore
from loralab.evolution.guarded import noise_ratios
from loralab.evolution.noise import pairs
from loralab.evolution.opening import open_search
from loralab.evolution.shaping import tied_share
from loralab.evolution.space import NOISE_KEPT, Perturbed
from loralab.evolution.strategy import SearchState
from loralab.evolution.workbench import Workbench
from loralab.health.ledger import FINDINGS
from loralab.health.population import dominance, generation_shares
from loralab.health.preflight import Memory, free_memory, weight_bytes
from loralab.rollouts import Batch, Rollout
from loralab.run import Run
from loralab.tasks.base import Task
from loralab.timings import Timings

_MEMBERS, _PROMPTS = 4, 8
_OUTLIERS = 3
_CENTRE = "centre"
_POINTS: Mapping[str, int] = {"sgd": 3, "momentum": 4, "adam": 5}
"""fp32 vectors as long as the searched one: the start, the point and the step, and moments."""


@dataclass(frozen=True)
class FirstGeneration:
    """values: `es.*` and `setup.*` of a reading. notes: the same for people, and outliers."""

    values: Mapping[str, float]
    notes: tuple[str, ...]


def first_generation(
    config: EvolveConfig, task: Task, model: Any, tokenizer: Any
) -> FirstGeneration:
    """Of a search that would begin now on this model, which is left as it is.

    Raises:
        UserError: what the search itself would refuse.
    """
    if not task.examples("train"):
        raise UserError(f"task {task.name!r} has no training examples")
    engine = BatchedEngine(
        model,
        tokenizer,
        backend=config.engine.backend,
        memory_gb=config.engine.memory_gb,
        threads=config.threads,
    )
    weights = targeted_weights(model, config.adapter)
    bench = Workbench(engine, weights, save_model=lambda _: None)
    with TemporaryDirectory() as folder:
        with Run.create(Path(folder) / "search", config.to_dict()) as run:
            state = open_search(config, run, task, bench, Timings(), ignore).state
        outliers = list(islice(durable.read_lines(run.path / FINDINGS), _OUTLIERS))
    members = _members(state)
    noise = noise_ratios(state.space, weights)
    scale = state.sigma_scale
    loudest = max(noise, key=lambda name: noise[name])
    need = _memory(state, members, model)
    values = {"es.dominance": dominance(noise), **need.values()}
    notes = [
        f"noise: a member moves W by {scale * median(noise.values()):.3g} of its mean size in the "
        f"median module, by {scale * noise[loudest]:.3g} in {loudest}",
        *(f"weights: {line['what']}" for line in outliers),
        str(need),
    ]
    if members.unchanged_share is not None:
        values["es.noop"] = members.unchanged_share
        notes[0] += f"; {members.unchanged_share:.1%} of its entries are lost to rounding"
    centre, answers = _answers(config, task, engine, members)
    shares, told = _compared(centre, answers, config.evolution.antithetic)
    return FirstGeneration({**values, **shares}, (*notes, told))


def _members(state: SearchState) -> Perturbed:
    """The first of generation 0."""
    options = state.options
    return state.space.perturb(
        state.master,
        state.seed,
        0,
        min(_MEMBERS, options.population),
        options.antithetic,
        state.sigma_scale,
        torch.get_num_threads(),
    )


def _answers(
    config: EvolveConfig, task: Task, engine: BatchedEngine, members: Perturbed
) -> tuple[list[Rollout], list[list[Rollout]]]:
    """Of the centre, and of each member."""
    examples = tuple(task.examples("train")[:_PROMPTS])
    batch = Batch(task, "train", examples, config.generation, f"{config.seed}|0")
    adapters = {f"member-{at}": member for at, member in enumerate(members.members)}
    loaded = dict(adapters)
    if members.centre.adapter is not None:
        loaded[_CENTRE] = members.centre.adapter
    engine.set_base(members.centre.change or {})
    try:
        engine.load(loaded)
        names = [_CENTRE if _CENTRE in loaded else None, *adapters]
        made = engine.generate([request for name in names for request in batch.requests(name)])
    finally:
        engine.load({})
        engine.set_base({})
    size = len(examples)
    centre, *others = [batch.judge(made[at * size : (at + 1) * size]) for at in range(len(names))]
    return centre, others


def _compared(
    centre: Sequence[Rollout], members: Sequence[Sequence[Rollout]], antithetic: bool
) -> tuple[dict[str, float], str]:
    rewards = [[one.score.reward for one in row] for row in members]
    means = [fmean(row) for row in rewards]
    texts = [[one.text for one in row] for row in members]
    shares = generation_shares(rewards, texts, antithetic)
    own = generation_shares([means[:1]], [[one.text for one in centre]], False)
    start = [one.text for one in centre]
    differ = fmean(float(a != b) for row in texts for a, b in zip(row, start, strict=True))
    values = {
        "es.spread": pstdev(means),
        "es.ties": tied_share(means),
        "es.informative": shares["informative_share"],
        "es.distinct": shares["distinct_share"],
        "es.repetition": shares["looping_share"] - own["looping_share"],
    }
    told = (
        f"members: {len(members)} on {len(start)} prompts: {differ:.0%} of their answers are not "
        f"the centre's; rewards {', '.join(f'{mean:.3g}' for mean in means)}, the centre's "
        f"{fmean(one.score.reward for one in centre):.3g}"
    )
    return values, told


def _memory(state: SearchState, members: Perturbed, model: Any) -> Memory:
    """Caches of the engine are left out: it takes what is there, and less at a time."""
    options, size = state.options, state.master.size
    each = _bytes(members.members) - _bytes(members.members[:1])
    each //= max(1, len(members.members) - 1)
    drawn = sum(array.nbytes for array in members.noise or ())
    drawn = (
        drawn * pairs(options.population, options.antithetic) // max(1, len(members.noise or ()))
    )
    parts = {
        f"{options.population} members": each * options.population,
        "noise": min(drawn, 4 * NOISE_KEPT),
        "point and optimiser": 4 * size * _POINTS[options.optimizer.name],
    }
    return Memory(
        weight_bytes(model), parts, free_memory(model.get_input_embeddings().weight.device)
    )


def _bytes(states: Sequence[AdapterState]) -> int:
    """What members share is counted once."""
    tensors = {id(t): t for state in states for pair in state.factors.values() for t in pair}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
