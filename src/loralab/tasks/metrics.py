"""Metrics over many completions, and how sure they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import fmean, stdev

from loralab.errors import UserError

RESAMPLES = 200
"""Of a bootstrap."""

_Z = 1.959964
"""Of 95 %."""


@dataclass(frozen=True)
class Estimate:
    """A number measured on some problems, as an estimate of what it is on all of their kind.

    error: its standard error, None of one problem alone. low, high: its 95 % interval, only for
    shares.
    """

    value: float
    error: float | None
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Plain values for JSON."""
        return {"value": self.value, "error": self.error, "low": self.low, "high": self.high}


def mean_of(problems: Sequence[float]) -> Estimate:
    """The mean over problems, one number each: where a problem has several completions, theirs
    have to be one number, as they are not independent."""
    error = stdev(problems) / sqrt(len(problems)) if len(problems) > 1 else None
    return Estimate(fmean(problems), error)


def share_of(problems: Sequence[float]) -> Estimate:
    """As `mean_of`, of numbers from 0 to 1, with the 95 % interval.

    The interval is Wilson's (1927) for p (1 - p) / error^2 problems, so many as would have this
    error were each right or wrong; where none or all are right, for as many as there are. It holds
    a chance above 0 where nothing was right.
    """
    mean = mean_of(problems)
    p, n = mean.value, float(len(problems))
    if mean.error:
        n = max(n, p * (1 - p) / mean.error**2)
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Estimate(p, mean.error, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap(
    measure: Callable[[Sequence[int]], Mapping[str, float]], problems: int, seed: int = 0
) -> dict[str, Estimate]:
    """What no mean over problems is (F1), with the standard deviation over resampled problems.

    measure: the numbers of the problems at these places (Efron 1979); one that cannot be measured
    without some kind of problem should be 0 there.
    """
    drawn = random.Random(seed)
    told = measure(range(problems))
    if problems < 2:
        return {name: Estimate(value, None) for name, value in told.items()}
    again = [measure(drawn.choices(range(problems), k=problems)) for _ in range(RESAMPLES)]
    return {
        name: Estimate(value, stdev(one[name] for one in again)) for name, value in told.items()
    }


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k completions is right, from `samples` of which `correct` are.

    1 - C(n - c, k) / C(n, k), which has no bias; 1 - (1 - c / n)^k is too low
    (Chen et al. 2021, arXiv:2107.03374, equation 1). Exact but for the last rounding.

    >>> pass_at_k(samples=5, correct=1, k=1)
    0.2

    Raises:
        UserError: fewer samples than k, or counts that cannot be.
    """
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} needs {k} completions a problem or more, not {samples}")
    if not 0 <= correct <= samples:
        raise UserError(f"pass@{k}: {correct} of {samples} completions cannot be right")
    total = comb(samples, k)
    return (total - comb(samples - correct, k)) / total


def mean_pass_at_k(problems: Iterable[Sequence[bool]], k: int) -> float:
    """pass@k over problems, each with its completions' correctness; they count alike."""
    return passes(problems, k).value


def passes(problems: Iterable[Sequence[bool]], k: int) -> Estimate:
    """As `mean_pass_at_k`, with its error over problems."""
    estimates = [pass_at_k(len(right), sum(right), k) for right in problems]
    if not estimates:
        raise UserError(f"pass@{k} of no problems")
    return share_of(estimates)


def f1(predicted: Sequence[int | None], gold: Sequence[int], label: int) -> float:
    """F1 of one class: 2 TP / (2 TP + FP + FN), 0 where there is neither; None is no prediction."""
    pairs = list(zip(predicted, gold, strict=True))
    hits = sum(p == g == label for p, g in pairs)
    missed = sum((p == label) != (g == label) for p, g in pairs)
    return 2 * hits / (2 * hits + missed) if hits else 0.0


def classification(predicted: Sequence[int | None], gold: Sequence[int]) -> dict[str, float]:
    """accuracy; f1, of the class with the highest index (SST-2's positive); f1_macro, the mean over
    the classes that gold has."""
    if not gold:
        raise UserError("no examples to classify")
    right = sum(p == g for p, g in zip(predicted, gold, strict=True))
    classes = sorted(set(gold))
    by_class = [f1(predicted, gold, label) for label in classes]
    return {
        "accuracy": right / len(gold),
        "f1": by_class[-1],
        "f1_macro": fmean(by_class),
    }
