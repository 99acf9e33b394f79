"""The charts of a run: drawn once, saved as PNG for `figures/` and as SVG for the page.

The SVG's colours are CSS variables, so that a chart follows the page's light or dark scheme.
Series differ by shape as well as by colour; the colours are told apart by colour-blind readers
(Okabe and Ito, https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from loralab.report.summary import Summary
from loralab.report.text import duration, is_number, number, share
from loralab.timings import ONE_TIME, OTHER, TOTAL, Row

INK, FAINT, GRID = "#1d2330", "#5b6472", "#d9dde4"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b3589a"
CORAL, STEEL_BLUE = "#ff7f50", "#4682b4"
_VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    GRID: "--line",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    PURPLE: "--purple",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
_WIDTH, _HEIGHT = 4.3, 3.0  # inches; small, so that text stays readable on a phone
_STACK = (BLUE, ORANGE, GREEN, PURPLE, CORAL, STEEL_BLUE)


@dataclass(frozen=True)
class Chart:
    """One drawn chart. svg: an `<svg>` element to put into HTML; png: the file's bytes."""

    name: str
    alt: str
    caption: str
    svg: str
    png: bytes


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
    steps = _rows_with(metrics, "reward_mean")
    held = _rows_with(metrics, "held_out_reward")
    if not steps and not held:
        return None

    def draw(axes: Any) -> None:
        x, mean = _column(steps, "generation"), _column(steps, "reward_mean")
        spread = _rows_with(steps, "reward_std")
        if spread:
            # Rewards are often bounded: the band must not promise what no member reached.
            low = [max(r["reward_mean"] - r["reward_std"], _or(r, "reward_min")) for r in spread]
            high = [min(r["reward_mean"] + r["reward_std"], _or(r, "reward_max")) for r in spread]
            axes.fill_between(
                _column(spread, "generation"), low, high, color=BLUE, alpha=0.18, linewidth=0,
                label="± 1 standard deviation",
            )  # fmt: skip
        best = _rows_with(steps, "reward_max")
        if best:
            axes.plot(
                _column(best, "generation"), _column(best, "reward_max"), color=FAINT,
                linewidth=1, linestyle=(0, (2, 2)), label="best member",
            )  # fmt: skip
        if steps:
            axes.plot(x, mean, color=BLUE, label="mean of the population", **_dot(steps))
        if held:
            axes.plot(
                _column(held, "generation"), _column(held, "held_out_reward"), color=ORANGE,
                linewidth=1.4, marker="o", markersize=4.5, label="held-out",
            )  # fmt: skip
        _title(axes, "Reward")
        _by_generation(axes)
        _legend(axes)

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
    return _finish("reward", alt + ".", caption, draw)


def correctness(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Share of correct answers, which a reward can betray."""
    steps, held = _rows_with(metrics, "correct"), _rows_with(metrics, "held_out_correct")
    if not steps and not held:
        return None

    def draw(axes: Any) -> None:
        if steps:
            axes.plot(
                _column(steps, "generation"), _column(steps, "correct"), color=GREEN,
                label="population", **_dot(steps),
            )  # fmt: skip
        if held:
            axes.plot(
                _column(held, "generation"), _column(held, "held_out_correct"), color=ORANGE,
                linewidth=1.4, marker="o", markersize=4.5, label="held-out",
            )  # fmt: skip
        _title(axes, "Correct answers")
        _percent_axis(axes)
        _by_generation(axes)
        _legend(axes)

    rows, key = (held, "held_out_correct") if held else (steps, "correct")
    alt = f"Share of correct answers: from {share(rows[0][key])} to {share(rows[-1][key])}."
    return _finish("correctness", alt, "By the task's own measure, apart from the reward.", draw)


def generation_time(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Seconds of each generation; stacked by phase where rows hold `phases: {name: seconds}`."""
    rows = _rows_with(metrics, "seconds")
    if not rows:
        return None
    names = {name: None for row in rows for name in _phases(row)}
    sums = {name: sum(_phases(row).get(name, 0.0) for row in rows) for name in names}
    stacked = sorted(sums, key=lambda name: -sums[name])[: len(_STACK)]

    def draw(axes: Any) -> None:
        x, bottom = _column(rows, "generation"), [0.0] * len(rows)
        width = 0.8 * min([b - a for a, b in pairwise(x)], default=1)
        if len(rows) > 120:  # bars would be thinner than a pixel
            axes.fill_between(x, _column(rows, "seconds"), color=STEEL_BLUE, linewidth=0)
        elif not stacked:
            axes.bar(x, _column(rows, "seconds"), width=width, color=STEEL_BLUE)
        else:
            for name, colour in zip(stacked, _STACK, strict=False):
                part = [_phases(row).get(name, 0.0) for row in rows]
                axes.bar(x, part, width=width, bottom=bottom, color=colour, label=_words(name))
                bottom = [low + high for low, high in zip(bottom, part, strict=True)]
            rest = [max(row["seconds"] - low, 0.0) for row, low in zip(rows, bottom, strict=True)]
            axes.bar(x, rest, width=width, bottom=bottom, color=GRID, label="other")
            _legend(axes)
        _title(axes, "Seconds per generation")
        axes.set_ylim(bottom=0)
        _by_generation(axes)

    times = sorted(_column(rows, "seconds"))
    alt = (
        f"Time per generation: median {duration(times[len(times) // 2])}, "
        f"shortest {duration(times[0])}, longest {duration(times[-1])}."
    )
    return _finish("generation_time", alt, "Wall clock, from ask to tell.", draw)


def time_breakdown(timings: Sequence[Row]) -> Chart | None:
    """One bar per category, longest on top: coral each generation, steel blue once a run."""
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
                Patch(color=CORAL, label="per generation"),
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
        _title(axes, "Where the time went" + (f": {duration(total)}" if total else ""))

    longest_first = ", ".join(f"{_words(r.name)} {duration(r.seconds)}" for r in reversed(rows))
    height = max(_HEIGHT, 0.75 + 0.25 * (len(rows) + 1))
    return _finish(
        "time_breakdown", f"Time by category: {longest_first}.",
        "Coral happens each generation, steel blue once a run.", draw, height,
    )  # fmt: skip


def _category_colour(name: str) -> str:
    if name == OTHER:
        return GRID
    return STEEL_BLUE if name in ONE_TIME else CORAL


def lost_signal(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Share of perturbed entries that rounding undoes, and of members whose fitness is tied."""
    cast, tied = _rows_with(metrics, "unchanged_share"), _rows_with(metrics, "tied_share")
    if not cast and not tied:
        return None
    most = min(1.0, max(_column(cast, "unchanged_share") + _column(tied, "tied_share")))

    def draw(axes: Any) -> None:
        if cast:
            axes.plot(
                _column(cast, "generation"), _column(cast, "unchanged_share"), color=PURPLE,
                label="unchanged by the cast", **_dot(cast),
            )  # fmt: skip
        if tied:
            axes.plot(
                _column(tied, "generation"), _column(tied, "tied_share"), color=FAINT,
                linestyle=(0, (4, 2)), linewidth=1.4, label="tied fitness", **_dot(tied),
            )  # fmt: skip
        _title(axes, "Noise that had no effect")
        _percent_axis(axes, next(top for top in (0.02, 0.1, 0.2, 0.4, 1.0) if most <= top))
        _by_generation(axes)
        _legend(axes)

    parts = []
    if cast:
        parts.append(f"entries unchanged by the cast: {share(cast[-1]['unchanged_share'])}")
    if tied:
        parts.append(f"members with tied fitness: {share(tied[-1]['tied_share'])}")
    caption = "Perturbed entries that round back to where they were; members no reward tells apart."
    return _finish("lost_signal", f"In the last generation, {'; '.join(parts)}.", caption, draw)


def update_size(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Root mean square of each update: growth means divergence, zero that nothing is learned."""
    rows = _rows_with(metrics, "update_rms")
    if not rows:
        return None

    def draw(axes: Any) -> None:
        axes.plot(
            _column(rows, "generation"), _column(rows, "update_rms"), color=BLUE, **_dot(rows)
        )
        _title(axes, "Size of the update")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        _by_generation(axes)

    alt = f"RMS of the update: first {number(_column(rows, 'update_rms')[0])}, "
    alt += f"last {number(_column(rows, 'update_rms')[-1])}."
    caption = (
        "Root mean square over the searched parameters; zero where no reward told members apart."
    )
    return _finish("update_size", alt, caption, draw)


def _finish(
    name: str, alt: str, caption: str, draw: Callable[[Any], None], height: float = _HEIGHT
) -> Chart:
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=160, facecolor="white")
        figure.set_layout_engine("none")  # keep the places it found; finding them again is slow
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Chart(name, alt, caption, _for_page(svg.getvalue(), name), png.getvalue())


def _for_page(svg: str, name: str) -> str:
    """Keep the element alone, hide it from screen readers (the figure has the alt text)."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are shared by all charts of a page; only referenced ones (clip paths, markers) matter.
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|matplotlib|text|xtick|ytick|legend|FillBetween'
                 r'|PolyCollection|LineCollection)[\w.]*"', "", svg)  # fmt: skip
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'aria-hidden="true"', svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _title(axes: Any, title: str) -> None:
    axes.figure.suptitle(title, x=0.012, ha="left")


def _by_generation(axes: Any) -> None:
    axes.set_xlabel("generation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    axes.spines["left"].set_visible(False)


def _percent_axis(axes: Any, top: float = 1.0) -> None:
    axes.set_ylim(-0.03 * top, 1.03 * top)
    axes.set_yticks([0, 0.25 * top, 0.5 * top, 0.75 * top, top])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0 if top >= 0.2 else 1))


def _legend(axes: Any) -> None:
    """Below the axes, where it can hide no line."""
    axes.figure.legend(
        loc="outside lower center", ncols=2, handlelength=1.6, labelspacing=0.3, columnspacing=1.4
    )


def _dot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of one point is invisible without a marker."""
    return {"marker": "s", "markersize": 4} if len(rows) == 1 else {}


def _rows_with(rows: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if is_number(row.get(key))]


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


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
