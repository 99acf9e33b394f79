"""The numbers of a generation: a line of metrics.jsonl, and the event a display shows."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from loralab.evolution.arena import Answers
from loralab.evolution.events import GenerationDone
from loralab.evolution.journal import HeldOut
from loralab.evolution.layout import Floats
from loralab.evolution.opening import Best
from loralab.evolution.shaping import tied_share
from loralab.evolution.strategy import Population, SearchState
from loralab.rollouts import Rollout, plain, share_correct

_PIECE = 2**20


def generation_row(
    before: SearchState,
    after: SearchState,
    population: Population,
    answers: Answers,
    means: Sequence[float],
    seconds: float,
) -> dict[str, Any]:
    """One generation; rewards are of members (means over prompts), `correct` is of rollouts."""
    rollouts = answers.everything
    return {
        "generation": before.generation,
        "reward_mean": fmean(means),
        "reward_std": pstdev(means),
        "reward_min": min(means),
        "reward_max": max(means),
        "correct": share_correct(rollouts),
        "seconds": seconds,
        "tokens": answers.tokens,
        "tokens_per_second": answers.tokens_per_second,
        "sigma_scale": before.sigma_scale,
        "lr": before.lr,
        "update_rms": _rms_of_change(before.master, after.master),
        "unchanged_share": population.perturbed.unchanged_share,
        "tied_share": tied_share(means),
        "failed": sum(rollout.failed is not None for rollout in rollouts),
    }


def score_of(rollouts: Sequence[Rollout]) -> HeldOut | None:
    """Mean reward and share of correct answers, None of no rollouts."""
    if not rollouts:
        return None
    return HeldOut(fmean(r.score.reward for r in rollouts), share_correct(rollouts))


def held_out_row(
    score: HeldOut | None, rollouts: Sequence[Rollout], best: Best | None
) -> dict[str, Any]:
    """What a generation that was tested adds to its line; {} for others."""
    if score is None or best is None:
        return {}
    return {
        "held_out_reward": score.reward,
        "held_out_std": pstdev(r.score.reward for r in rollouts),
        "held_out_correct": score.correct,
        "best_generation": best.state.generation,
    }


def generation_done(
    row: dict[str, Any], of: int, top: Rollout, best: Best | None, time_left: float
) -> GenerationDone:
    """The event of a line of metrics."""
    return GenerationDone(
        generation=row["generation"],
        of=of,
        reward_mean=row["reward_mean"],
        reward_std=row["reward_std"],
        reward_max=row["reward_max"],
        correct=row["correct"],
        best_prompt=plain(top.prompt),
        best_completion=top.text,
        best_reward=top.score.reward,
        held_out=row.get("held_out_reward"),
        best_held_out=None if best is None else best.held_out.reward,
        best_generation=None if best is None else best.state.generation,
        seconds=row["seconds"],
        tokens_per_second=row["tokens_per_second"],
        time_left=time_left,
    )


def _rms_of_change(before: Floats, after: Floats) -> float:
    """In pieces: the difference of all weights at once would need as much memory again."""
    total = 0.0
    for at in range(0, before.size, _PIECE):
        change = after[at : at + _PIECE] - before[at : at + _PIECE]
        total += float(np.dot(change, change))
    return sqrt(total / before.size)


def reward_table(members: Sequence[Sequence[Rollout]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Rewards (P, prompts)."""
    return np.array([[r.score.reward for r in row] for row in members], dtype=np.float64)
