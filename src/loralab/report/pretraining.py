"""What a pretraining run came to: its loss beside the held-out one, perplexity, texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.report import text
from loralab.report.chart import (
    BLUE,
    FAINT,
    ORANGE,
    Chart,
    along,
    column,
    finish,
    legend,
    rows_with,
    title,
)
from loralab.report.plots import time_breakdown
from loralab.report.summary import Change, Tone
from loralab.report.training import TrainingSummary, single_chart, summarise_training
from loralab.run import Run


@dataclass(frozen=True)
class PretrainingSummary:
    """A training summary, and the evaluations: rows that hold a held-out loss."""

    training: TrainingSummary
    evaluations: tuple[Mapping[str, Any], ...]

    @property
    def loss(self) -> Change:
        """Held-out, in nats a token, before and at the last evaluation."""
        return _ends(self.evaluations, "held_out_loss")

    @property
    def perplexity(self) -> Change:
        """exp of `loss`."""
        return _ends(self.evaluations, "perplexity")

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The evaluation with the lowest loss."""
        return min(self.evaluations, key=lambda row: row["held_out_loss"], default=None)

    def verdict(self) -> tuple[Tone, str]:
        """Whether what was held out became more likely, and whether it still does."""
        training = self.training
        if not training.steps:
            return "open", "No step has finished yet."
        if self.loss.delta is None:
            return "open", f"Loss is {text.number(training.loss.after)}; nothing was held out."
        ends = text.change(self.perplexity.before, self.perplexity.after).replace(" → ", " to ")
        verb = "fell" if self.loss.delta < 0 else "rose"
        said = f"Held-out perplexity {verb} from {ends} in {training.done} steps."
        if self.loss.delta >= 0:
            return "bad", said
        if self.best is not None and self.best["held_out_loss"] < 0.99 * self.loss.after:  # type: ignore[operator]
            return "mixed", (
                f"{said} It was {text.number(self.best['perplexity'])} at step "
                f"{self.best['step']}: since then the text was learned by heart."
            )
        return "good", said

    def line(self) -> str:
        """Loss and perplexity, each before → after."""
        parts = [f"loss {text.change(self.training.loss.before, self.training.loss.after)}"]
        if self.loss.delta is not None:
            ends = self.perplexity
            parts.append(f"held-out perplexity {text.change(ends.before, ends.after)}")
        return ", ".join(parts)


def summarise_pretraining(run: Run) -> PretrainingSummary:
    """Read the directory of a pretraining run, finished or not.

    Raises:
        UserError: a file of the run is damaged.
    """
    evaluations = rows_with(run.metrics(), "held_out_loss")
    return PretrainingSummary(summarise_training(run), tuple(evaluations))


def pretraining_charts(summary: PretrainingSummary) -> list[Chart]:
    """Every chart the run has data for, in the order of the page."""
    steps = summary.training.steps
    drawn = (
        _losses(steps, summary.evaluations),
        _perplexity(summary.evaluations),
        single_chart(steps, "grad_norm", "Gradient", "Norm, before clipping.", BLUE),
        single_chart(steps, "lr", "Learning rate", "As the schedule set it.", FAINT),
        time_breakdown(summary.training.timings, "step"),
    )  # fmt: skip
    return [chart for chart in drawn if chart is not None]


def pretraining_tiles(summary: PretrainingSummary) -> list[dict[str, str]]:
    """The row of figures under the verdict: label, value, note."""
    training, loss, perplexity = summary.training, summary.loss, summary.perplexity
    speed = training.tokens_per_second
    return [
        {
            "label": "Held-out perplexity",
            "value": text.change(perplexity.before, perplexity.after),
            "note": "untrained → last evaluation",
        },
        {
            "label": "Held-out loss",
            "value": text.change(loss.before, loss.after),
            "note": "nats a token",
        },
        {
            "label": "Training loss",
            "value": text.change(training.loss.before, training.loss.after),
            "note": f"first and last tenth of {training.done} steps",
        },
        {"label": "Time", "value": text.duration(training.seconds), "note": "all of it"},
        {
            "label": "Tokens per second",
            "value": text.number(None if speed is None else round(speed)),
            "note": f"trained, median; {text.number(training.tokens)} in all",
        },
    ]


def _losses(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Chart | None:
    if not steps:
        return None

    def draw(axes: Any) -> None:
        axes.plot(
            column(steps, "step"), column(steps, "loss"), color=FAINT, linewidth=0.8, alpha=0.7,
            label="each step",
        )  # fmt: skip
        if evaluations:
            axes.plot(
                column(evaluations, "step"), column(evaluations, "held_out_loss"), color=BLUE,
                marker="o", markersize=4, label="held out",
            )  # fmt: skip
        title(axes, "Loss")
        along(axes, "step")
        legend(axes)

    first, last = steps[0]["loss"], steps[-1]["loss"]
    alt = f"Training loss from {text.number(first)} to {text.number(last)}"
    if evaluations:
        alt += f"; held-out loss at the end {text.number(evaluations[-1]['held_out_loss'])}"
    return finish("loss", f"{alt}.", "Mean negative log-likelihood of a token, in nats.", draw)


def _perplexity(evaluations: Sequence[Mapping[str, Any]]) -> Chart | None:
    rows = [row for row in rows_with(evaluations, "perplexity") if row["perplexity"] > 0]
    if not rows:
        return None

    def draw(axes: Any) -> None:
        axes.plot(
            column(rows, "step"), column(rows, "perplexity"), color=ORANGE, marker="o",
            markersize=4.5,
        )  # fmt: skip
        axes.set_yscale("log")
        low, high = (f(column(rows, "perplexity")) for f in (min, max))
        marks = [m * 10**e for e in range(math.floor(math.log10(low)), 7) for m in (1, 2, 5)]
        axes.set_yticks([mark for mark in marks if low / 1.5 <= mark <= high * 1.5])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: text.number(value))
        title(axes, "Held-out perplexity")
        along(axes, "step")

    ends = f"{text.number(rows[0]['perplexity'])} to {text.number(rows[-1]['perplexity'])}"
    alt = f"Held-out perplexity from {ends}."
    return finish("perplexity", alt, "exp(held-out loss); lower is better.", draw)


def _ends(rows: Sequence[Mapping[str, Any]], key: str) -> Change:
    found = rows_with(rows, key)
    if not found:
        return Change(None, None)
    return Change(found[0][key] if len(found) > 1 else None, found[-1][key])
