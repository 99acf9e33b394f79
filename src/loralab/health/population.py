"""What a population shows: whether its noise tells anything, and whether reward means merit.

Shares of one generation go into its line of metrics.jsonl; `population_values` reads `es.*` off
those lines, so that a finished run can be judged as a running one is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isnan, nan, sqrt
from statistics import fmean, median, stdev
from typing import Any

from loralab.health.text import LONG_RUN, LOOPING, longest_run, repetition

WINDOW = 5
"""Generations of which values are means, and that are set against the first as many."""
_LEAST_MODULES = 4
_FLOOR = 0.01


def generation_shares(
    rewards: Sequence[Sequence[float]], texts: Sequence[Sequence[str]], antithetic: bool
) -> dict[str, float]:
    """Of one generation; rewards and texts by member and prompt.

    informative_share: of antithetic pairs, those whose two members differ in mean reward; else of
        members, those that differ from the most frequent reward.
    distinct_share: mean over prompts of the share of members whose text is not the most frequent.
    looping_share: of all completions, those that repeat themselves.
    """
    means = [fmean(row) for row in rewards]
    if antithetic:
        pairs = list(zip(means[::2], means[1::2], strict=True))
        informative = fmean(float(a != b) for a, b in pairs)
    else:
        informative = _off_the_most_frequent(means)
    return {
        "informative_share": informative,
        "distinct_share": fmean(
            _off_the_most_frequent(column) for column in zip(*texts, strict=True)
        ),
        "looping_share": fmean(float(loops(text)) for row in texts for text in row),
    }


def loops(text: str) -> bool:
    """Whether a text repeats itself, told from words and characters: an engine may give no ids."""
    words = [hash(word) for word in text.split()]
    characters = [ord(character) for character in text]
    return repetition(words) > LOOPING or longest_run(characters) > 4 * LONG_RUN


def dominance(ratios: Mapping[str, float]) -> float:
    """The loudest module's noise over |W|, times the median module's; NaN of fewer than four.

    ratios: RMS of the change that one member's noise makes to W over the mean |W|, by module.
    """
    sizes = [ratio for ratio in ratios.values() if ratio > 0]
    return max(sizes) / median(sizes) if len(sizes) >= _LEAST_MODULES else nan


def population_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`es.*` from the lines of metrics.jsonl so far, oldest first; {} without any generation.

    Means over the last WINDOW generations: es.spread (standard deviation of members' rewards),
    es.ties, es.informative, es.distinct, es.noop (noise lost to rounding), es.correct.
    es.repetition: rise of the share of members' texts that repeat.
    es.reward_up, es.correct_up, es.second_measure: rise of the mean reward, rise of the share of
    correct answers, and the greater of its fall and the rise of repeating texts, from the first
    WINDOW generations to the last, in standard errors; es.second_fall: the third as it is, in
    shares. es.held_out_gap: the lesser of the rise of
    the training reward and the fall of the held-out reward from its best, in standard errors. NaN
    until there are enough: twice WINDOW generations, WINDOW held-out scores.
    """
    rows = [row for row in rows if "reward_mean" in row]
    if not rows:
        return {}
    values = {
        name: _mean(_column(rows[-WINDOW:], key))
        for name, key in (
            ("es.spread", "reward_std"),
            ("es.ties", "tied_share"),
            ("es.informative", "informative_share"),
            ("es.distinct", "distinct_share"),
            ("es.noop", "unchanged_share"),
            ("es.correct", "correct"),
        )
    }
    looping = _column(rows, "looping_share")
    values["es.repetition"] = _mean(looping[-WINDOW:]) - (looping[0] if looping else nan)
    # A task that has no notion of a right answer is not solved either.
    if isnan(values["es.correct"]):
        values["es.correct"] = 0.0
    up, right = _rise(_column(rows, "reward_mean")), _rise(_column(rows, "correct"))
    worse = [-right, _rise(looping)]
    known = [value for value in worse if not isnan(value)]
    values |= {"es.reward_up": up, "es.correct_up": right}
    values["es.second_measure"] = max(known) if known else nan
    falls = [-_change(_column(rows, "correct")), _change(looping)]
    values["es.second_fall"] = max((fall for fall in falls if not isnan(fall)), default=nan)
    down = _fall(_column(rows, "held_out_reward"))
    # min() gives the other one where the second is NaN.
    values["es.held_out_gap"] = nan if isnan(up) or isnan(down) else min(up, down)
    return values


def _off_the_most_frequent(values: Sequence[Any]) -> float:
    return 1 - max(Counter(values).values()) / len(values)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None]


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else nan


def _change(values: Sequence[float]) -> float:
    """From the mean of the first WINDOW values to that of the last."""
    if len(values) < 2 * WINDOW:
        return nan
    return fmean(values[-WINDOW:]) - fmean(values[:WINDOW])


def _rise(values: Sequence[float]) -> float:
    """From the first WINDOW values to the last, in standard errors of that difference.

    A floor under the error keeps a measure that never moved from making a hair's breadth certain.
    """
    change = _change(values)
    if isnan(change):
        return nan
    first, last = values[:WINDOW], values[-WINDOW:]
    scale = max(abs(value) for value in values) or 1.0
    error = sqrt((stdev(first) ** 2 + stdev(last) ** 2) / WINDOW)
    return change / max(error, _FLOOR * scale)


def _fall(values: Sequence[float]) -> float:
    """From the best two in a row to the last two, in standard errors told from how much one value
    differs from the next."""
    if len(values) < WINDOW:
        return nan
    steps = [b - a for a, b in pairwise(values)]
    scale = max(abs(value) for value in values) or 1.0
    error = max(sqrt(fmean(step**2 for step in steps) / 2), _FLOOR * scale)
    pairs = [(a + b) / 2 for a, b in pairwise(values)]
    return (max(pairs) - pairs[-1]) / error
