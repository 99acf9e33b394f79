"""Rejection sampling: which of a model's completions are worth learning (RFT, arXiv:2308.01825)."""

from __future__ import annotations

from collections.abc import Sequence

from loralab.engines.base import Completion
from loralab.rollouts import Batch, Rollout


def judged_by(
    batches: Sequence[Batch], answers: Sequence[Completion]
) -> list[tuple[Rollout, Completion]]:
    """What each batch makes of its completions; `answers` are those of all, one batch behind the
    other."""
    found, at = list[tuple[Rollout, Completion]](), 0
    for batch in batches:
        given = answers[at : at + len(batch.examples)]
        found += zip(batch.judge(given), given, strict=True)
        at += len(given)
    return found


def scoring(
    judged: Sequence[tuple[Rollout, Completion]], min_reward: float | None
) -> tuple[list[Rollout], int]:
    """What scores, each text once an example, in the order of the examples; and how many scored
    but were cut off: a student of those would learn to end in the middle."""
    found: dict[tuple[str, str], Rollout] = {}
    cut = 0
    for rollout, completion in judged:
        score = rollout.score
        good = score.correct if min_reward is None else score.reward >= min_reward
        if not good or rollout.failed is not None or not rollout.text.strip():
            continue
        if completion.finish_reason == "length":
            cut += 1
            continue
        found.setdefault((rollout.example.id, rollout.text), rollout)
    order: dict[str, int] = {}
    for rollout, _ in judged:
        order.setdefault(rollout.example.id, len(order))
    return sorted(found.values(), key=lambda rollout: order[rollout.example.id]), cut
