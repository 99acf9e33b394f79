"""PEFT's LoRA directories for other formats, which know one rank and one scaling alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loralab.adapters.factors import Factors, padded
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
    made, widened = _one_rank(scaled)
    return Reading(AdapterState(made, scaling, base=base, extra=dict(extra)), (*folded, *widened))


def _one_rank(factors: Mapping[str, Factors]) -> tuple[dict[str, Factors], tuple[str, ...]]:
    """Zero rows and columns added up to the largest rank, and a note where there are any."""
    rank = max(f.A.shape[0] for f in factors.values())
    made = {module: padded(pair, rank) for module, pair in factors.items()}
    short = sum(pair.A.shape[0] < rank for pair in factors.values())
    if not short:
        return made, ()
    return made, (f"changed: {short} of {len(made)} modules padded with zeros to rank {rank}",)
