"""What a fine-tuning run came to: its loss, and what the model answered before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from loralab.report.chart import (
    BLUE,
    FAINT,
    GREEN,
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
from loralab.report.plots import time_breakdown
from loralab.report.splines import spline_charts
from loralab.report.summary import Change, Pair, Tone, median, pair_up, within_noise
from loralab.report.text import change, number, share
from loralab.run import Run
from loralab.timings import TOTAL, Row, Timings

SMOOTHED = 0.1
"""Share of the steps over which the loss at either end is averaged: single batches differ."""


@dataclass(frozen=True)
class TrainingSummary:
    """Everything the page says about one fine-tuning run, free of layout.

    steps: rows of metrics that hold a loss. scores: those that hold a held-out score. loss: mean
    over the first and the last tenth of the steps. planned: None where epochs were asked for.
    """

    kind: str
    steps: tuple[Mapping[str, Any], ...]
    scores: tuple[Mapping[str, Any], ...]
    loss: Change
    held_out: Change
    correct: Change
    planned: int | None
    finished: bool
    seconds: float | None
    tokens: int | None
    tokens_per_second: float | None
    kernel: str | None
    failed: int
    cut: int
    timings: tuple[Row, ...]
    pairs: tuple[Pair, ...]

    @property
    def done(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    def verdict(self) -> tuple[Tone, str]:
        """One or two sentences for the top of the page, and their tone: a falling loss alone says
        that the rows were learned, not that the answers are better."""
        if not self.steps:
            return "open", "No step has finished yet."
        span = f"in {self.done} steps"
        said = _moved("Loss", self.loss, number, span)
        if self.held_out.delta is None:
            return "open", f"{said} Nothing was answered after it yet: the loss does not say more."
        said += " " + _moved("Held-out reward", self.held_out, number, "")
        tone: Tone = "good" if self.held_out.delta > 0 else "bad"
        if self.held_out.delta == 0:
            tone = "mixed"
        elif within_noise(self.pairs):
            tone = "mixed"
            said += " That may be chance: few answers changed."
        if self.correct.delta is not None:
            said += " " + _moved("Correct answers", self.correct, share, "")
        return tone, said

    def line(self) -> str:
        """Loss, held-out reward and correct answers, each before → after."""
        parts = [f"loss {change(self.loss.before, self.loss.after)}"]
        if self.held_out.delta is not None:
            parts.append(f"held-out {change(self.held_out.before, self.held_out.after)}")
        if self.correct.delta is not None:
            parts.append(f"correct {share(self.correct.before)} → {share(self.correct.after)}")
        return ", ".join(parts)


def summarise_training(run: Run) -> TrainingSummary:
    """Read the directory of a fine-tuning run, finished or not.

    Raises:
        UserError: a file of the run is damaged.
    """
    metrics, completions = run.metrics(), run.completions()
    steps, scores = rows_with(metrics, "loss"), rows_with(metrics, "held_out_reward")
    finished = any(row.get("phase") == "after" for row in metrics)
    training = run.config.get("training")
    planned = training.get("steps") if isinstance(training, Mapping) else None
    table = Timings.load(run.timings_path).table()
    facts = run.environment()
    first, last = (scores[0] if scores else {}), (scores[-1] if len(scores) > 1 else {})
    return TrainingSummary(
        kind=str(run.config.get("kind")),
        steps=tuple(steps),
        scores=tuple(scores),
        loss=_ends([row["loss"] for row in steps]),
        held_out=Change(first.get("held_out_reward"), last.get("held_out_reward")),
        correct=Change(first.get("held_out_correct"), last.get("held_out_correct")),
        planned=planned if isinstance(planned, int) else None,
        finished=finished or (isinstance(planned, int) and bool(steps) and _at(steps) >= planned),
        seconds=next((row.seconds for row in table if row.name == TOTAL), None),
        tokens=steps[-1].get("tokens") if steps else None,
        tokens_per_second=median(metrics, "tokens_per_second"),
        kernel=str(facts["kernel"]) if facts.get("kernel") else None,
        failed=sum(row["failed"] for row in scores if isinstance(row.get("failed"), int)),
        cut=facts["rows_cut"] if isinstance(facts.get("rows_cut"), int) else 0,
        timings=tuple(table),
        pairs=tuple(pair_up([{**row, "generation": row.get("step")} for row in completions])),
    )


def training_charts(summary: TrainingSummary) -> list[Chart]:
    """Every chart the run has data for, in the order of the page."""
    drawn = (
        *_of_kind(summary),
        _loss(summary),
        _held_out(summary.scores),
        single_chart(summary.steps, "grad_norm", "Gradient", "Norm over all trained weights, "
                     "before clipping: growth means divergence.", BLUE),
        *spline_charts(summary.steps),
        single_chart(summary.steps, "lr", "Learning rate", "As the schedule set it.", FAINT),
        time_breakdown(summary.timings, "step"),
    )  # fmt: skip
    return [chart for chart in drawn if chart is not None]


_LOSSES = {
    "dpo": "A pair's -log sigmoid of its margin: ln 2 = 0.693 where nothing is preferred yet.",
    "grpo": "The clipped policy loss, near 0 by its making: the reward is what to look at.",
    "verifier": "Cross-entropy of the judgements: ln 2 = 0.693 for one that knows nothing.",
}
_LOSS = "Mean negative log-likelihood of a learned token, in nats; a step's own rows."


def _of_kind(summary: TrainingSummary) -> list[Chart | None]:
    """What only some kinds of training log: reward of a policy, margin of pairs."""
    steps = summary.steps
    return [
        single_chart(steps, "reward_mean", "Training reward", "Mean over the completions that the "
                     "step learns from.", ORANGE, floor=None),
        single_chart(steps, "margin", "Preference margin", "Mean over the step's pairs of the "
                     "chosen answer's reward less the rejected one's.", ORANGE, floor=None),
        single_chart(steps, "judged_right", "Solutions judged right", "Share of the step's "
                     "solutions.", ORANGE),
    ]  # fmt: skip


def _loss(summary: TrainingSummary) -> Chart | None:
    steps = summary.steps
    if not steps:
        return None
    losses = column(steps, "loss")
    width = max(1, round(SMOOTHED * len(steps)))
    mean = [fmean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]

    def draw(axes: Any) -> None:
        x = column(steps, "step")
        axes.plot(x, losses, color=FAINT, linewidth=0.8, alpha=0.7, label="each step", **dot(steps))
        if width > 1:
            axes.plot(x, mean, color=BLUE, label=f"mean of {width} steps")
        title(axes, "Loss")
        along(axes, "step")
        legend(axes)

    alt = f"Training loss over {len(steps)} logged steps: from {number(losses[0])} to "
    alt += f"{number(losses[-1])}, lowest {number(min(losses))}."
    return finish("loss", alt, _LOSSES.get(summary.kind, _LOSS), draw)


def _held_out(scores: Sequence[Mapping[str, Any]]) -> Chart | None:
    if not scores:
        return None
    correct = rows_with(scores, "held_out_correct")
    key = "held_out_correct" if correct else "held_out_reward"
    rows = correct or list(scores)

    def draw(axes: Any) -> None:
        axes.plot(
            column(rows, "step"), column(rows, key), color=GREEN if correct else ORANGE,
            marker="o", markersize=4.5,
        )  # fmt: skip
        title(axes, "Held-out correct answers" if correct else "Held-out reward")
        if correct:
            percent_axis(axes)
        along(axes, "step")

    shown = share if correct else number
    alt = f"Held-out score: from {shown(rows[0][key])} to {shown(rows[-1][key])}."
    return finish("held_out", alt, "Step 0 is the base model.", draw)


def single_chart(
    steps: Sequence[Mapping[str, Any]],
    key: str,
    name: str,
    caption: str,
    colour: str,
    floor: float | None = 0,
) -> Chart | None:
    """One column of the steps' lines over the steps; None where no line has it.

    floor: where the axis begins, None where the numbers do.
    """
    rows = rows_with(steps, key)
    if not rows:
        return None

    def draw(axes: Any) -> None:
        axes.plot(column(rows, "step"), column(rows, key), color=colour, **dot(rows))
        title(axes, name)
        axes.set_ylim(bottom=floor)
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        along(axes, "step")

    values = column(rows, key)
    alt = f"{name}: first {number(values[0])}, last {number(values[-1])}, "
    return finish(key, f"{alt}highest {number(max(values))}.", caption, draw)


def _moved(name: str, ends: Change, shown: Any, span: str) -> str:
    before, after, behind = shown(ends.before), shown(ends.after), f" {span}" * bool(span)
    if ends.delta is None:
        return f"{name} is {after}{behind}."
    if ends.delta == 0:
        return f"{name} stayed at {after}{behind}."
    return f"{name} {'rose' if ends.delta > 0 else 'fell'} from {before} to {after}{behind}."


def _ends(losses: Sequence[float]) -> Change:
    if len(losses) < 2:
        return Change(None, losses[0] if losses else None)
    width = max(1, round(SMOOTHED * len(losses)))
    return Change(fmean(losses[:width]), fmean(losses[-width:]))


def _at(steps: Sequence[Mapping[str, Any]]) -> int:
    return int(steps[-1]["step"])
