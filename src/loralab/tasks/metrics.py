"""Metrics over many completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import comb
from statistics import fmean

from loralab.errors import UserError


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
    estimates = [pass_at_k(len(right), sum(right), k) for right in problems]
    if not estimates:
        raise UserError(f"pass@{k} of no problems")
    return fmean(estimates)


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
