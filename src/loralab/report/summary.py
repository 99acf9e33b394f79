"""What a run came to: before and after, the verdict, and the completions paired by example."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loralab.report import text
from loralab.report.text import is_number, number, share
from loralab.run import Run
from loralab.timings import TOTAL, Row, Timings

Tone = Literal["good", "mixed", "bad", "open"]


@dataclass(frozen=True)
class Change:
    """A measure before any update and at the end; None where it was not measured."""

    before: float | None
    after: float | None

    @property
    def delta(self) -> float | None:
        if self.before is None or self.after is None:
            return None
        return self.after - self.before


@dataclass(frozen=True)
class Pair:
    """One held-out example: its first completion, its last, and all in between."""

    example: str
    prompt: Any
    gold: Any
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    timeline: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Summary:
    """Everything the page says about one run, free of layout.

    metrics: rows by generation, the last one where a generation was logged twice.
    planned: generations in the config, None if it does not say.
    best_generation: the one whose adapter was kept.
    seconds_per_generation, tokens_per_second: medians.
    failed: completions in training that could not be generated or scored.
    """

    metrics: tuple[Mapping[str, Any], ...]
    reward: Change
    held_out: Change
    correct: Change
    best_generation: int | None
    generations: int
    planned: int | None
    seconds: float | None
    seconds_per_generation: float | None
    tokens_per_second: float | None
    kernel: str | None
    failed: int
    timings: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    training_samples: tuple[Mapping[str, Any], ...]

    @property
    def finished(self) -> bool:
        return self.planned is None or self.generations >= self.planned

    @property
    def reward_changes(self) -> tuple[float, ...]:
        """Change of reward of each held-out example that has a completion at both ends."""
        return reward_changes(self.pairs)

    @property
    def better_worse(self) -> str | None:
        """On how many held-out examples the reward rose and fell."""
        changes = self.reward_changes
        if not changes:
            return None
        better, worse = sum(d > 0 for d in changes), sum(d < 0 for d in changes)
        return f"better on {better}, worse on {worse} of {len(changes)} examples"

    @property
    def within_noise(self) -> bool:
        """Whether the mean paired change is under two standard errors: it may be chance."""
        return within_noise(self.pairs)

    def verdict(self) -> tuple[Tone, str]:
        """One or two sentences for the top of the page, and their tone."""
        if not self.metrics:
            return "open", "No generation has finished yet."
        change, name = self.held_out, "Held-out reward"
        if change.delta is None:
            change, name = self.reward, "Training reward (nothing held out was scored twice)"
        if change.delta is None or self.generations < 2:
            return "open", f"{name} is {number(change.after)}; no second measurement yet."
        span = f"in {self.generations} generations"
        ends = text.change(change.before, change.after).replace(" → ", " to ")
        if change.delta > 0:
            said = f"{name} rose from {ends} {span}."
        elif change.delta < 0:
            said = f"{name} fell from {ends} {span}."
        else:
            said = f"{name} stayed at {number(change.after)} {span}."
        tone: Tone = "good" if change.delta > 0 else "bad"
        if change is self.held_out and change.delta and self.within_noise:
            tone = "mixed"
            said += f" That may be chance: {self.better_worse}."
        if self.correct.delta is not None:
            before, after = share(self.correct.before), share(self.correct.after)
            if self.correct.delta < 0:
                tone = "mixed" if tone == "good" else tone
                said += (
                    f" Correct answers fell from {before} to {after}: "
                    "the reward is not the whole story, read the completions."
                )
            elif self.correct.delta > 0:
                said += f" Correct answers rose from {before} to {after}."
            else:
                said += f" Correct answers stayed at {after}."
        return tone, said


def reward_changes(pairs: Sequence[Pair]) -> tuple[float, ...]:
    """Change of reward of each example that has a completion at both ends."""
    return tuple(
        pair.after["reward"] - pair.before["reward"]
        for pair in pairs
        if pair.before
        and pair.after
        and is_number(pair.before.get("reward"))
        and is_number(pair.after.get("reward"))
    )


def within_noise(pairs: Sequence[Pair]) -> bool:
    """Whether the mean paired change of reward is under two standard errors."""
    changes = reward_changes(pairs)
    if len(changes) < 2:
        return False
    error = statistics.stdev(changes) / math.sqrt(len(changes))
    return abs(statistics.fmean(changes)) < 2 * error


def summarise(run: Run) -> Summary:
    """Read a run directory, finished or not.

    Raises:
        UserError: a file of the run is damaged.
    """
    metrics = _by_generation(run.metrics())
    completions = run.completions()
    scored = [row for row in metrics if is_number(row.get("held_out_reward"))]
    steps = [row for row in metrics if is_number(row.get("reward_mean"))]
    best = next(
        (row["best_generation"] for row in reversed(metrics) if _is_index(row, "best_generation")),
        None,
    )
    kept = next((row for row in scored if row["generation"] == best), scored[-1] if scored else {})
    first = scored[0] if scored else {}
    held_out = Change(_get(first, "held_out_reward"), _get(kept, "held_out_reward"))
    correct = Change(_get(first, "held_out_correct"), _get(kept, "held_out_correct"))
    evolution = run.config.get("evolution")
    planned = evolution.get("generations") if isinstance(evolution, Mapping) else None
    table = Timings.load(run.timings_path).table()
    total = next((row.seconds for row in table if row.name == TOTAL), None)
    kernel = run.environment().get("kernel") or next(
        (row["kernel"] for row in metrics if row.get("kernel")), None
    )
    return Summary(
        metrics=tuple(metrics),
        reward=Change(
            _get(steps[0], "reward_mean") if steps else None,
            _get(steps[-1], "reward_mean") if steps else None,
        ),
        held_out=held_out,
        correct=correct,
        best_generation=best,
        generations=len(steps),
        planned=planned if isinstance(planned, int) else None,
        seconds=total,
        seconds_per_generation=median(metrics, "seconds"),
        tokens_per_second=median(metrics, "tokens_per_second"),
        kernel=None if kernel is None else str(kernel),
        failed=sum(row["failed"] for row in metrics if _is_index(row, "failed")),
        timings=tuple(table),
        pairs=tuple(pair_up(completions)),
        training_samples=tuple(row for row in completions if row.get("split") == "train"),
    )


def _by_generation(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    latest = {row["generation"]: row for row in rows if _is_index(row, "generation")}
    return [latest[generation] for generation in sorted(latest)]


def pair_up(rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Completions of held-out examples, one pair an example."""
    examples: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("split") != "train":
            examples.setdefault(str(row.get("example")), []).append(row)
    pairs = []
    for example, group in examples.items():
        before = _last(group, "before")
        after = _last(group, "after")
        # A resumed run may have logged a generation twice: the later row counts.
        during = {row.get("generation"): row for row in group if row.get("phase") == "during"}
        timeline = tuple(during.values())
        if after is None and timeline:
            after = timeline[-1]
        head = before or after or group[0]
        pairs.append(Pair(example, head.get("prompt"), head.get("gold"), before, after, timeline))
    return pairs


def _last(rows: Sequence[Mapping[str, Any]], phase: str) -> Mapping[str, Any] | None:
    return next((row for row in reversed(rows) if row.get("phase") == phase), None)


def _get(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if is_number(value) else None  # type: ignore[arg-type]


def median(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Of the rows where the key holds a number; None where none does."""
    values = [row[key] for row in rows if is_number(row.get(key))]
    return float(statistics.median(values)) if values else None


def _is_index(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row.get(key), int)
