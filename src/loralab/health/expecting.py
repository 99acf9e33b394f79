"""Several sets of rows read in one pass, so that a prompt which rows of them share runs once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from loralab.health.forced import Forced, Row, compare
from loralab.health.known_base import KnownBase
from loralab.health.runners import Runner, by_row


@dataclass(frozen=True)
class RowSet:
    """base: compared with the base. keep: they are the same at each look, so that the base's part
    is worth keeping."""

    rows: Sequence[Row]
    base: bool = False
    keep: bool = False


def expected(
    sets: Sequence[RowSet], runner: Runner, known: KnownBase | None = None
) -> list[Forced]:
    """What a model expects along each set, its rows in their order.

    known: the base, of those sets that ask for it.
    """
    rows = [row for one in sets for row in one.rows]
    of = [one for one in sets for _ in one.rows]
    found: dict[int, Forced] = {}
    for batch in runner.batches(rows):
        here = [rows[at] for at in batch]
        logits = by_row(runner.run(here).logits, here)
        beside: dict[int, Tensor] = {}
        for keep in (True, False):
            some = [at for at in batch if of[at].base and of[at].keep == keep]
            if some and known is not None:
                chosen = [rows[at] for at in some]
                base = by_row(known.logits(chosen, keep), chosen)
                beside |= zip(some, base, strict=True)
        for at, own in zip(batch, logits, strict=True):
            found[at] = compare(rows[at], own, beside.get(at))
    made, begin = [], 0
    for one in sets:
        places = range(begin, begin + len(one.rows))
        parts = [found[at] for at in places if at in found]
        made.append(Forced.joined(parts) if parts else Forced.none())
        begin = places.stop
    return made
