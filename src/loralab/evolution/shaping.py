"""From rewards to the weights of an update.

All of it is done in exact or scale-free arithmetic, so that ties are ties: members with equal
rewards get equal weights, and a population that is tied throughout gives exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, isfinite, sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt

Shaping = Literal["raw", "zscore", "centered_rank"]
Fitness = npt.ArrayLike
"""(P,) or (P, prompts)."""


def shape(
    fitness: Fitness, shaping: Shaping, floor: float | None = None, per_prompt: bool = False
) -> list[float]:
    """Shaped fitness (P,) of rewards (P,) or (P, prompts).

    raw: the rewards themselves. zscore: (f - mean) / standard deviation. centered_rank: average
    ranks mapped to [-0.5, 0.5] (Salimans et al. 2017, arXiv 1703.03864).

    floor: replaces rewards that are not finite; None takes the lowest finite one.
    per_prompt: compare members prompt by prompt, then average: each prompt's rewards are shaped
        on their own (raw: minus the prompt's mean), so that a prompt with widely spread rewards
        does not drown the others. Otherwise rewards are averaged over prompts first.

    Raises:
        ValueError: fewer than two members, no prompts, or more than two dimensions.
    """
    rewards = np.asarray(fitness, dtype=np.float64)
    if rewards.ndim not in (1, 2) or rewards.shape[0] < 2 or 0 in rewards.shape:
        raise ValueError(f"fitness has shape {rewards.shape}; expected (P,) or (P, prompts), P > 1")
    rewards = replaced(rewards, floor)
    if rewards.ndim == 1:
        rewards = rewards[:, None]
    if per_prompt:
        columns = [_shape_column(column, shaping, centre=True) for column in rewards.T.tolist()]
        return [fsum(row) / len(columns) for row in zip(*columns, strict=True)]
    return _shape_column(mean_over_prompts(rewards), shaping, centre=False)


def mean_over_prompts(rewards: npt.NDArray[np.float64]) -> list[float]:
    """Each member's mean reward of (P, prompts), the same in any order of the prompts."""
    return [_mean(row) for row in rewards.tolist()]


def _mean(values: list[float]) -> float:
    try:
        return fsum(values) / len(values)
    except OverflowError:
        return fsum(v / len(values) for v in values)


def replaced(rewards: npt.NDArray[np.float64], floor: float | None) -> npt.NDArray[np.float64]:
    """The rewards with what is not finite replaced by the floor."""
    finite = np.isfinite(rewards)
    if finite.all():
        return rewards
    if floor is None or not isfinite(floor):
        floor = float(rewards[finite].min()) if finite.any() else 0.0
    return np.where(finite, rewards, floor)


def tied_share(fitness: Sequence[float]) -> float:
    """Share of members whose fitness equals that of another member."""
    values, counts = np.unique(np.asarray(fitness, dtype=np.float64), return_counts=True)
    return 1.0 - float((counts == 1).sum()) / len(fitness) if len(values) else 0.0


def _shape_column(rewards: list[float], shaping: Shaping, centre: bool) -> list[float]:
    tied = min(rewards) == max(rewards)
    if shaping == "raw" and not centre:
        return rewards
    if tied:
        return [0.0] * len(rewards)
    if shaping == "centered_rank":
        return _centred_ranks(rewards)
    if shaping == "raw":
        mean = _mean(rewards)
        return [r - mean for r in rewards]
    return _zscores(rewards)


def _zscores(rewards: list[float]) -> list[float]:
    """Scaled to 1 first, and again after centring, so that no square over- or underflows."""
    largest = max(abs(r) for r in rewards)
    scaled = [r / largest for r in rewards]
    mean = _mean(scaled)
    deviations = [s - mean for s in scaled]
    furthest = max(abs(d) for d in deviations)
    if furthest == 0:
        return [0.0] * len(rewards)
    deviations = [d / furthest for d in deviations]
    spread = sqrt(fsum(d * d for d in deviations) / len(deviations))
    return [d / spread for d in deviations]


def _centred_ranks(rewards: list[float]) -> list[float]:
    _, inverse, counts = np.unique(rewards, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    average = last - (counts + 1) / 2  # mean of the ranks (from 0) that the tied ones share
    top = len(rewards) - 1
    ranks: list[float] = ((average[inverse] - top / 2) / top).tolist()
    return ranks
