"""One chart: drawn once, saved as PNG for `figures/` and as SVG for the page.

The SVG's colours are CSS variables, so that a chart follows the page's light or dark scheme.
Series differ by shape as well as by colour; the colours are told apart by colour-blind readers
(Okabe and Ito, https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from loralab.report.text import is_number

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
_WIDTH, HEIGHT = 4.3, 3.0  # inches; small, so that text stays readable on a phone


@dataclass(frozen=True)
class Chart:
    """One drawn chart. svg: an `<svg>` element to put into HTML; png: the file's bytes."""

    name: str
    alt: str
    caption: str
    svg: str
    png: bytes


def finish(
    name: str, alt: str, caption: str, draw: Callable[[Any], None], height: float = HEIGHT
) -> Chart:
    """The chart that `draw` makes on empty axes; alt and caption are plain text."""
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


def title(axes: Any, words: str) -> None:
    """Above the axes, at their left."""
    axes.figure.suptitle(words, x=0.012, ha="left")


def along(axes: Any, unit: str = "generation") -> None:
    """Whole generations or steps on the x axis."""
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    axes.spines["left"].set_visible(False)


def percent_axis(axes: Any, top: float = 1.0) -> None:
    """Shares from 0 to top as percentages on the y axis."""
    axes.set_ylim(-0.03 * top, 1.03 * top)
    axes.set_yticks([0, 0.25 * top, 0.5 * top, 0.75 * top, top])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0 if top >= 0.2 else 1))


def legend(axes: Any) -> None:
    """Below the axes, where it can hide no line."""
    axes.figure.legend(
        loc="outside lower center", ncols=2, handlelength=1.6, labelspacing=0.3, columnspacing=1.4
    )


def dot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of one point is invisible without a marker."""
    return {"marker": "s", "markersize": 4} if len(rows) == 1 else {}


def rows_with(rows: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """Those rows where the key holds a finite number."""
    return [row for row in rows if is_number(row.get(key))]


def column(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """One key of every row."""
    return [row[key] for row in rows]
