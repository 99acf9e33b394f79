"""Exact statistics of counts: intervals of a rate, and of pairs that went two ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, fsum, lgamma, log, log1p


def interval(hits: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a rate, exact for a binomial count (Biometrika 26, 1934).

    (0, 1) of nothing.
    """
    if of == 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else _root(lambda p: _between(hits, of, of, p) - tail)
    high = 1.0 if hits == of else _root(lambda p: tail - _between(0, hits, of, p))
    return low, high


def sign_test(first: Sequence[bool], second: Sequence[bool]) -> float:
    """One-sided p that `second` is right as often as `first`, of pairs that differ (McNemar,
    exact); 1 where none does."""
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    won = sum(b and not a for a, b in zip(first, second, strict=True))
    return _between(lost, lost + won, lost + won, 0.5) if lost + won else 1.0


def _between(least: int, most: int, of: int, rate: float) -> float:
    """P(least <= hits <= most), 0 < rate < 1; by logarithms, which a large `of` does not break."""
    heads, tails = log(rate), log1p(-rate)
    whole = lgamma(of + 1)
    return fsum(
        exp(whole - lgamma(k + 1) - lgamma(of - k + 1) + k * heads + (of - k) * tails)
        for k in range(least, most + 1)
    )


def _root(rising: Callable[[float], float]) -> float:
    """Where a function that rises over [0, 1] is 0."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
