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
