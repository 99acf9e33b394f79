"""What an LS-LoRA adapter's splines did in training, drawn from the lines of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.report.chart import (
    BLUE,
    ORANGE,
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
from loralab.report.text import number, share


def spline_charts(steps: Sequence[Mapping[str, Any]]) -> list[Chart | None]:
    """Deviation from the identity, share of inputs outside the grid, slopes and scales; [] where no
    line has them."""
    if not rows_with(steps, "spline_deviation"):
        return []
    largest = "mean over the layers, and the largest."
    return [
        _pair(steps, "spline_deviation", "Splines: distance from the identity",
              f"Mean |v - k| of a layer, {largest} 0 is plain LoRA."),
        _pair(steps, "spline_outside", "Splines: inputs outside the grid",
              f"Share of what the step put in, {largest}", percent=True),
        _pair(steps, "spline_slope_variance", "Splines: variance of the slopes",
              f"Of a layer's segments, {largest} 0 is a straight line."),
        _scales(steps),
    ]  # fmt: skip


def _pair(
    steps: Sequence[Mapping[str, Any]], key: str, name: str, caption: str, percent: bool = False
) -> Chart | None:
    rows = rows_with(steps, key)
    if not rows:
        return None

    def draw(axes: Any) -> None:
        x = column(rows, "step")
        axes.plot(x, column(rows, key), color=BLUE, label="mean", **dot(rows))
        axes.plot(x, column(rows, f"{key}_max"), color=ORANGE, label="largest", **dot(rows))
        title(axes, name)
        axes.set_ylim(bottom=0)
        if percent:
            percent_axis(axes)
        else:
            axes.yaxis.set_major_formatter(lambda value, _: number(value))
        along(axes, "step")
        legend(axes)

    shown = share if percent else number
    alt = f"{name}: mean {shown(rows[0][key])} at first, {shown(rows[-1][key])} at last, "
    return finish(key, f"{alt}largest {shown(rows[-1][key + '_max'])}.", caption, draw)


def _scales(steps: Sequence[Mapping[str, Any]]) -> Chart:
    rows = rows_with(steps, "spline_input_scale")

    def draw(axes: Any) -> None:
        x = column(rows, "step")
        for letter, key, colour in (("i", "input", BLUE), ("o", "output", ORANGE)):
            axes.plot(x, column(rows, f"spline_{key}_scale"), color=colour, label=letter,
                      **dot(rows))  # fmt: skip
        title(axes, "Splines: scales")
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        along(axes, "step")
        legend(axes)

    last = rows[-1]
    alt = f"Scales at last: i {number(last['spline_input_scale'])}, "
    alt += f"o {number(last['spline_output_scale'])}."
    return finish("spline_scales", alt, "Mean over the layers; both start at 1.", draw)
