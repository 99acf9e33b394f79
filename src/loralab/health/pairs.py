"""Whether answers of rows belong to their prompts, told by what a model makes of them.

A model that reads its prompts finds an answer likelier behind its own prompt than behind another
row's. The base says so of the rows before anything is learned, if it can tell; the trained model
says what it has learned of them: rows whose answers were shuffled teach that prompts tell nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, nan, sqrt
from statistics import fmean, stdev
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from loralab.health.forced import Row, distribution, pieces
from loralab.health.runners import Runner, by_row

IGNORED = -100
LEAST = 4
"""Pairs, under which nothing is said."""
SCALES = (0.5, 0.25, 0.125, 0.0625)
"""Of its own, at which an adapter is tried that makes its rows unlikelier than the base does."""

_PAIRS, _PROMPT, _ANSWER = 16, 128, 32
_LEAST_ERROR = 1e-3


class Learned(Protocol):
    """Ids, and labels equal to them or -100."""

    @property
    def input_ids(self) -> tuple[int, ...]: ...
    @property
    def labels(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> int:
        """Where the first learned token stands."""
        ...


Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Pairs:
    """own: prompts and answers. crossed: the same answers, each behind a prompt whose own answer is
    another. ends: tokens that end an answer."""

    own: tuple[Pair, ...]
    crossed: tuple[Pair, ...]
    ends: frozenset[int]


@dataclass(frozen=True)
class Heard:
    """What a model makes of pairs. gains: of each, the nats a token that its answer costs more
    behind the other prompt. loss: nats a token of the answers behind their own prompts. surplus:
    (vocabulary,) of each token its share of the answers less the mean chance that the model gives
    it there, ends left out."""

    gains: tuple[float, ...]
    loss: float
    surplus: Tensor

    @property
    def gain(self) -> float:
        return fmean(self.gains)

    @property
    def error(self) -> float:
        """Standard error of the gain; NaN of a model whose numbers are none."""
        if not all(map(isfinite, self.gains)):
            return nan
        return max(stdev(self.gains) / sqrt(len(self.gains)), _LEAST_ERROR)

    @property
    def overexpected(self) -> float:
        """Of the token that the model expects most beyond its share: by how much."""
        return -float(self.surplus.min())


def pairs_of(
    rows: Sequence[Learned], ends: Collection[int] = (), count: int = _PAIRS, seed: int = 0
) -> Pairs | None:
    """Evenly chosen rows with a prompt and an answer, no prompt twice. Long prompts keep their end,
    long answers their beginning. Rows that share an answer are not exchanged, since it fits both.

    None where fewer than LEAST have another to exchange with.
    """
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for row in rows:
        answer = tuple(token for token in row.labels[row.start :] if token != IGNORED)
        if row.start > 1 and answer:
            found.setdefault(row.input_ids[: row.start][-_PROMPT:], answer[:_ANSWER])
    known = list(found.items())
    chosen = known[:: max(1, len(known) // count)][:count]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)).tolist()
    own, crossed = [], []
    for at, place in enumerate(order):
        prompt, answer = chosen[place]
        others = (chosen[order[at - step]] for step in range(1, len(order)))
        other = next((p for p, a in others if a != answer), None)
        if other is not None:
            own.append((prompt, answer))
            crossed.append((other, answer))
    return Pairs(tuple(own), tuple(crossed), frozenset(ends)) if len(own) >= LEAST else None


@torch.no_grad()
def heard(runner: Runner, pairs: Pairs) -> Heard:
    """Of a causal language model as it stands."""
    count = len(pairs.own)
    losses, expected = _losses(runner, (*pairs.own, *pairs.crossed), count)
    own, crossed = losses[:count], losses[count:]
    gains = tuple(b - a for a, b in zip(own, crossed, strict=True))
    tokens = torch.tensor([token for _, answer in pairs.own for token in answer])
    share = torch.bincount(tokens, minlength=len(expected)).float()
    surplus = (share - expected) / len(tokens)
    # How often an answer ends is told by its length, not by a weight in the loss.
    surplus[[end for end in pairs.ends if end < len(surplus)]] = 0.0
    return Heard(gains, _mean(own, pairs), surplus)


@torch.no_grad()
def loss_of(runner: Runner, pairs: Pairs) -> float:
    """Nats a token of the answers behind their own prompts."""
    return _mean(_losses(runner, pairs.own, 0)[0], pairs)


@contextmanager
def scaled(causal: Any, by: float) -> Iterator[None]:
    """Every adapter's scaling times `by`, put back afterwards."""
    layers = [
        module.scaling
        for module in causal.modules()
        if isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "scaling", None), dict)
    ]
    before = [dict(scaling) for scaling in layers]
    try:
        for scaling in layers:
            scaling.update({name: value * by for name, value in scaling.items()})
        yield
    finally:
        for scaling, kept in zip(layers, before, strict=True):
            scaling.update(kept)


def _mean(losses: Sequence[float], pairs: Pairs) -> float:
    """Over tokens."""
    sizes = [len(answer) for _, answer in pairs.own]
    return sum(a * n for a, n in zip(losses, sizes, strict=True)) / sum(sizes)


def _losses(runner: Runner, pairs: Sequence[Pair], summed: int) -> tuple[list[float], Tensor]:
    """Mean nats of each answer behind its prompt, and the sum of the distributions (vocabulary,)
    over all tokens of the first `summed` answers."""
    rows = [Row(at, prompt + answer, len(prompt)) for at, (prompt, answer) in enumerate(pairs)]
    losses, total = [nan] * len(rows), torch.zeros(0)
    for batch in runner.batches(rows):
        here = [rows[at] for at in batch]
        for at, logits in zip(batch, by_row(runner.run(here).logits, here), strict=True):
            answer = torch.tensor(rows[at].answer, device=logits.device)
            nats, step = 0.0, pieces(logits)
            for begin in range(0, len(answer), step):
                p, log_p = distribution(logits[begin : begin + step])
                nats -= float(log_p.gather(1, answer[begin : begin + step, None]).sum())
                if at < summed:
                    chances = p.sum(0).cpu()
                    total = chances if not len(total) else total.add_(chances)
            losses[at] = nats / len(answer)
    return losses, total
