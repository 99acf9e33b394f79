"""The charts of a search: rewards, correct answers, time, and what had no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from loralab.report.chart import (
    BLUE,
    CORAL,
    FAINT,
    GREEN,
    GRID,
    HEIGHT,
    INK,
    ORANGE,
    PURPLE,
    STEEL_BLUE,
    Chart,
    along,
    column,
    dot,
    finish,
    legend,
    percent_axis,
    rows_with,
    title,
)
from loralab.report.summary import Summary
from loralab.report.text import duration, is_number, number, share
from loralab.timings import ONE_TIME, OTHER, TOTAL, Row

_STACK = (BLUE, ORANGE, GREEN, PURPLE, CORAL, STEEL_BLUE)


def charts(summary: Summary) -> list[Chart]:
    """Every chart the run has data for, in the order of the page."""
    drawn = (
        reward(summary.metrics),
        correctness(summary.metrics),
        generation_time(summary.metrics),
        time_breakdown(summary.timings),
        lost_signal(summary.metrics),
        update_size(summary.metrics),
    )
    return [chart for chart in drawn if chart is not None]


def reward(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Mean reward of the population with its spread, its best member, the held-out score."""
    steps = rows_with(metrics, "reward_mean")
    held = rows_with(metrics, "held_out_reward")
    if not steps and not held:
        return None

    def draw(axes: Any) -> None:
        x, mean = column(steps, "generation"), column(steps, "reward_mean")
        spread = rows_with(steps, "reward_std")
        if spread:
            # Rewards are often bounded: the band must not promise what no member reached.
            low = [max(r["reward_mean"] - r["reward_std"], _or(r, "reward_min")) for r in spread]
            high = [min(r["reward_mean"] + r["reward_std"], _or(r, "reward_max")) for r in spread]
            axes.fill_between(
                column(spread, "generation"), low, high, color=BLUE, alpha=0.18, linewidth=0,
                label="± 1 standard deviation",
            )  # fmt: skip
        best = rows_with(steps, "reward_max")
        if best:
            axes.plot(
                column(best, "generation"), column(best, "reward_max"), color=FAINT,
                linewidth=1, linestyle=(0, (2, 2)), label="best member",
            )  # fmt: skip
        if steps:
            axes.plot(x, mean, color=BLUE, label="mean of the population", **dot(steps))
        if held:
            axes.plot(
                column(held, "generation"), column(held, "held_out_reward"), color=ORANGE,
                linewidth=1.4, marker="o", markersize=4.5, label="held-out",
            )  # fmt: skip
        title(axes, "Reward")
        along(axes)
        legend(axes)

    ends = f"from {number(steps[0]['reward_mean'])} to {number(steps[-1]['reward_mean'])}" * bool(
        steps
    )
    alt = f"Reward over {len(steps)} generations: population mean {ends}".rstrip()
    if held:
        alt += (
            f"; held-out from {number(held[0]['held_out_reward'])} "
            f"to {number(held[-1]['held_out_reward'])}"
        )
    caption = "Of the perturbed members on training prompts; held-out is the adapter itself."
    return finish("reward", alt + ".", caption, draw)


def correctness(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Share of correct answers, which a reward can betray."""
    steps, held = rows_with(metrics, "correct"), rows_with(metrics, "held_out_correct")
    if not steps and not held:
        return None

    def draw(axes: Any) -> None:
        if steps:
            axes.plot(
                column(steps, "generation"), column(steps, "correct"), color=GREEN,
                label="population", **dot(steps),
            )  # fmt: skip
        if held:
            axes.plot(
                column(held, "generation"), column(held, "held_out_correct"), color=ORANGE,
                linewidth=1.4, marker="o", markersize=4.5, label="held-out",
            )  # fmt: skip
        title(axes, "Correct answers")
        percent_axis(axes)
        along(axes)
        legend(axes)

    rows, key = (held, "held_out_correct") if held else (steps, "correct")
    alt = f"Share of correct answers: from {share(rows[0][key])} to {share(rows[-1][key])}."
    return finish("correctness", alt, "By the task's own measure, apart from the reward.", draw)


def generation_time(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Seconds of each generation; stacked by phase where rows hold `phases: {name: seconds}`."""
    rows = rows_with(metrics, "seconds")
    if not rows:
        return None
    names = {name: None for row in rows for name in _phases(row)}
    sums = {name: sum(_phases(row).get(name, 0.0) for row in rows) for name in names}
    stacked = sorted(sums, key=lambda name: -sums[name])[: len(_STACK)]

    def draw(axes: Any) -> None:
        x, bottom = column(rows, "generation"), [0.0] * len(rows)
        width = 0.8 * min([b - a for a, b in pairwise(x)], default=1)
        if len(rows) > 120:  # bars would be thinner than a pixel
            axes.fill_between(x, column(rows, "seconds"), color=STEEL_BLUE, linewidth=0)
        elif not stacked:
            axes.bar(x, column(rows, "seconds"), width=width, color=STEEL_BLUE)
        else:
            for name, colour in zip(stacked, _STACK, strict=False):
                part = [_phases(row).get(name, 0.0) for row in rows]
                axes.bar(x, part, width=width, bottom=bottom, color=colour, label=_words(name))
                bottom = [low + high for low, high in zip(bottom, part, strict=True)]
            rest = [max(row["seconds"] - low, 0.0) for row, low in zip(rows, bottom, strict=True)]
            axes.bar(x, rest, width=width, bottom=bottom, color=GRID, label="other")
            legend(axes)
        title(axes, "Seconds per generation")
        axes.set_ylim(bottom=0)
        along(axes)

    times = sorted(column(rows, "seconds"))
    alt = (
        f"Time per generation: median {duration(times[len(times) // 2])}, "
        f"shortest {duration(times[0])}, longest {duration(times[-1])}."
    )
    return finish("generation_time", alt, "Wall clock, from ask to tell.", draw)


def time_breakdown(timings: Sequence[Row], unit: str = "generation") -> Chart | None:
    """One bar per category, longest on top: coral each generation or step, steel blue once."""
    rows = [row for row in timings if row.name != TOTAL]
    if not rows:
        return None
    total = next((row.seconds for row in timings if row.name == TOTAL), None)
    rows = sorted(rows, key=lambda row: row.seconds)

    def draw(axes: Any) -> None:
        colours = [_category_colour(row.name) for row in rows]
        bars = axes.barh([_words(row.name) for row in rows], [r.seconds for r in rows], 0.68)
        for bar, colour in zip(bars, colours, strict=True):
            bar.set_facecolor(colour)
        longest = max(row.seconds for row in rows) or 1.0
        for place, row in enumerate(rows):
            axes.text(
                row.seconds + 0.015 * longest, place, duration(row.seconds), va="center",
                fontsize=9, parse_math=False,
            )  # fmt: skip
        axes.set_xlim(0, 1.22 * longest)
        axes.set_ylim(-0.6, len(rows) + 0.35)  # room for the legend above the longest bar
        axes.legend(
            handles=[
                Patch(color=CORAL, label=f"per {unit}"),
                Patch(color=STEEL_BLUE, label="one-time"),
            ],
            loc="upper right", ncols=2, borderaxespad=0, handlelength=1, columnspacing=1.2,
        )  # fmt: skip
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        axes.tick_params(axis="y", labelcolor=INK)
        for label in axes.get_yticklabels():
            label.set_parse_math(False)
        title(axes, "Where the time went" + (f": {duration(total)}" if total else ""))

    longest_first = ", ".join(f"{_words(r.name)} {duration(r.seconds)}" for r in reversed(rows))
    height = max(HEIGHT, 0.75 + 0.25 * (len(rows) + 1))
    return finish(
        "time_breakdown", f"Time by category: {longest_first}.",
        f"Coral happens each {unit}, steel blue once a run.", draw, height,
    )  # fmt: skip


def _category_colour(name: str) -> str:
    if name == OTHER:
        return GRID
    return STEEL_BLUE if name in ONE_TIME else CORAL


def lost_signal(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Share of perturbed entries that rounding undoes, and of members whose fitness is tied."""
    cast, tied = rows_with(metrics, "unchanged_share"), rows_with(metrics, "tied_share")
    if not cast and not tied:
        return None
    most = min(1.0, max(column(cast, "unchanged_share") + column(tied, "tied_share")))

    def draw(axes: Any) -> None:
        if cast:
            axes.plot(
                column(cast, "generation"), column(cast, "unchanged_share"), color=PURPLE,
                label="unchanged by the cast", **dot(cast),
            )  # fmt: skip
        if tied:
            axes.plot(
                column(tied, "generation"), column(tied, "tied_share"), color=FAINT,
                linestyle=(0, (4, 2)), linewidth=1.4, label="tied fitness", **dot(tied),
            )  # fmt: skip
        title(axes, "Noise that had no effect")
        percent_axis(axes, next(top for top in (0.02, 0.1, 0.2, 0.4, 1.0) if most <= top))
        along(axes)
        legend(axes)

    parts = []
    if cast:
        parts.append(f"entries unchanged by the cast: {share(cast[-1]['unchanged_share'])}")
    if tied:
        parts.append(f"members with tied fitness: {share(tied[-1]['tied_share'])}")
    caption = "Perturbed entries that round back to where they were; members no reward tells apart."
    return finish("lost_signal", f"In the last generation, {'; '.join(parts)}.", caption, draw)


def update_size(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Root mean square of each update: growth means divergence, zero that nothing is learned."""
    rows = rows_with(metrics, "update_rms")
    if not rows:
        return None

    def draw(axes: Any) -> None:
        axes.plot(column(rows, "generation"), column(rows, "update_rms"), color=BLUE, **dot(rows))
        title(axes, "Size of the update")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        along(axes)

    alt = f"RMS of the update: first {number(column(rows, 'update_rms')[0])}, "
    alt += f"last {number(column(rows, 'update_rms')[-1])}."
    caption = (
        "Root mean square over the searched parameters; zero where no reward told members apart."
    )
    return finish("update_size", alt, caption, draw)


def _or(row: Mapping[str, Any], key: str) -> float:
    """A bound on the band; one that was not logged does not bind."""
    missing = float("-inf") if key == "reward_min" else float("inf")
    return float(row[key]) if is_number(row.get(key)) else missing


def _phases(row: Mapping[str, Any]) -> dict[str, float]:
    phases = row.get("phases")
    if not isinstance(phases, Mapping):
        return {}
    return {str(name): float(value) for name, value in phases.items() if is_number(value)}


def _words(name: str) -> str:
    """A phase as a label; a very long one would leave no room for the chart."""
    return name.replace("_", " ") if len(name) <= 24 else name.replace("_", " ")[:23] + "…"
