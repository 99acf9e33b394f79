"""PEFT's LoRA directories for other formats, which know one rank and one scaling alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from loralab.adapters.factors import Factors
from loralab.adapters.plain_lora import one_scaling, read_plain
from loralab.adapters.state import AdapterState


@dataclass(frozen=True)
class Reading:
    """A plain LoRA adapter, and in words what differs from how its file had it."""

    state: AdapterState
    notes: tuple[str, ...]


def read_peft(directory: Path) -> Reading:
    """Read a plain LoRA (see `loralab.adapters.plain_lora`), brought to one rank.

    Raises:
        UserError: the adapter is more than W + scaling * B A, or belongs to a changed base (PiSSA
            and its like), or the file is damaged.
    """
    read = read_plain(directory)
    factors, notes = _one_rank(read.factors)
    state = AdapterState(factors, read.scaling, base=read.base, extra=read.extra)
    return Reading(state, (*read.notes, *notes))


def uniform(
    factors: Mapping[str, Factors],
    scalings: Mapping[str, float],
    base: str | None,
    extra: Mapping[str, object],
) -> Reading:
    """One rank and one scaling for all modules, exact but for float32 rounding of folded B."""
    scaled, scaling, folded = one_scaling(factors, scalings)
    made, padded = _one_rank(scaled)
    return Reading(AdapterState(made, scaling, base=base, extra=dict(extra)), (*folded, *padded))


def _one_rank(factors: Mapping[str, Factors]) -> tuple[dict[str, Factors], tuple[str, ...]]:
    """Zero rows and columns added up to the largest rank, and a note where there are any."""
    rank = max(f.A.shape[0] for f in factors.values())
    made, padded = {}, 0
    for module, (a, b) in factors.items():
        short = rank - a.shape[0]
        if short:
            a = torch.cat([a, a.new_zeros(short, a.shape[1])], 0)
            b = torch.cat([b, b.new_zeros(b.shape[0], short)], 1)
            padded += 1
        made[module] = Factors(a, b)
    if not padded:
        return made, ()
    return made, (f"changed: {padded} of {len(made)} modules padded with zeros to rank {rank}",)
