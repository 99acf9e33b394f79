"""A run directory becomes one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from loralab import durable
from loralab.report import plots, text
from loralab.report.chart import Chart
from loralab.report.health import finding_view, texts_by_look
from loralab.report.outcomes import (
    build_ablation_page,
    build_distillation_page,
    build_eval_page,
    build_scores_page,
)
from loralab.report.pretraining import (
    pretraining_charts,
    pretraining_tiles,
    summarise_pretraining,
)
from loralab.report.stages import build_stages_page
from loralab.report.summary import Change, Pair, Summary, summarise
from loralab.report.template import PAGE, render
from loralab.report.training import TrainingSummary, summarise_training, training_charts
from loralab.run import Run

OPEN_EXAMPLES = 8
"""Held-out examples shown unfolded; the others are one click away."""
MOST_EXAMPLES = 100
MOST_SAMPLES = 30
MOST_STEPS = 6
"""Completions between before and after that one example shows, evenly spread."""

_OWN: Mapping[str, Callable[[Run], Path]] = {
    "ablation": build_ablation_page,
    "distill": build_distillation_page,
    "eval": build_eval_page,
    "pipeline": build_stages_page,
    "task-eval": build_scores_page,
}
"""Kinds whose page is one of tables."""


def build_report(run_path: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into the run directory.

    Works on an unfinished run, and beside a process that writes it.

    Args:
        run_path: a run directory.

    Returns:
        The path of `report.html`.

    Raises:
        UserError: there is no run, it is damaged, or the directory cannot be written.
    """
    run = Run.open(run_path)
    own = _OWN.get(str(run.config.get("kind")))
    if own is not None:
        return own(run)
    view = view_of(run)
    for chart in view["charts"]:
        durable.write_whole(run.figures / f"{chart.name}.png", chart.png)
    target = run.path / PAGE
    durable.write_whole(target, render("page.html.j2", views=[view]))
    return target


def view_of(run: Run) -> dict[str, Any]:
    """What the template shows of one run."""
    if run.config.get("kind") == "pretrain":
        return _pretraining_view(run)
    if "training" in run.config:
        return _training_view(run)
    summary = summarise(run)
    kept = summary.best_generation
    notices = []
    if not summary.finished:
        notices.append(
            f"Unfinished: {summary.generations} of {summary.planned} generations so far."
        )
    if summary.failed:
        notices.append(
            f"{text.number(summary.failed)} completions could not be generated or scored; they "
            "got the lowest reward."
        )
    if kept is not None and kept != summary.metrics[-1]["generation"]:
        notices.append(
            f"The adapter kept is that of generation {kept}, the best by held-out score."
        )
    return {
        **_common(run, "generation", summary.verdict(), summary.pairs, plots.charts(summary)),
        "notices": notices,
        "tiles": _tiles(summary),
        "timings": summary.timings,
        "samples": _spread(summary.training_samples, MOST_SAMPLES),
        "samples_in_all": len(summary.training_samples),
    }


def _training_view(run: Run) -> dict[str, Any]:
    summary = summarise_training(run)
    notices = []
    if not summary.finished:
        of = "" if summary.planned is None else f" of {summary.planned}"
        notices.append(f"Unfinished: {summary.done}{of} steps so far.")
    if summary.cut:
        notices.append(
            f"{text.number(summary.cut)} training rows are longer than max_length and lost their "
            "end, end token included."
        )
    if summary.failed:
        notices.append(f"{text.number(summary.failed)} completions failed.")
    return {
        **_common(run, "step", summary.verdict(), summary.pairs, training_charts(summary)),
        "notices": notices,
        "tiles": _training_tiles(summary),
        "timings": summary.timings,
        "samples": [],
        "samples_in_all": 0,
    }


def _pretraining_view(run: Run) -> dict[str, Any]:
    summary = summarise_pretraining(run)
    training = summary.training
    notices = []
    if not training.finished:
        of = "" if training.planned is None else f" of {training.planned}"
        notices.append(f"Unfinished: {training.done}{of} steps so far.")
    return {
        **_common(run, "step", summary.verdict(), training.pairs, pretraining_charts(summary)),
        "notices": notices,
        "tiles": pretraining_tiles(summary),
        "timings": training.timings,
        "samples": [],
        "samples_in_all": 0,
    }


def _common(
    run: Run,
    unit: str,
    verdict: tuple[str, str],
    pairs: Sequence[Pair],
    charts: Sequence[Chart],
) -> dict[str, Any]:
    """unit: what the run's history is counted in."""
    shown = pairs[:MOST_EXAMPLES]
    return {
        "name": str(run.config.get("name") or run.path.resolve().name),
        "subtitle": text.subtitle(run.config),
        "unit": unit,
        "tone": verdict[0],
        "verdict": verdict[1],
        # Safe: matplotlib escapes the few labels that come from files.
        "charts": [Chart(c.name, c.alt, c.caption, Markup(c.svg), c.png) for c in charts],
        "open_pairs": [_pair_view(pair, MOST_STEPS, unit) for pair in shown[:OPEN_EXAMPLES]],
        "more_pairs": [_pair_view(pair, MOST_STEPS // 2, unit) for pair in shown[OPEN_EXAMPLES:]],
        "left_out": len(pairs) - len(shown),
        "findings": [finding_view(row) for row in run.findings()],
        "looks": texts_by_look(run.readings()),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "environment": _flat(run.environment()),
    }


def _tiles(summary: Summary) -> list[dict[str, str]]:
    """The row of figures under the verdict: label, value, note."""
    kept = summary.best_generation
    done = f"{summary.generations}"
    if summary.planned is not None and not summary.finished:
        done += f" of {summary.planned}"
    return [
        {
            "label": "Held-out reward",
            "value": text.change(summary.held_out.before, summary.held_out.after),
            "note": summary.better_worse
            or (f"kept from generation {kept}" if kept is not None else ""),
        },
        {
            "label": "Held-out correct",
            "value": _shares(summary.correct),
            "note": "by the task's own measure",
        },
        {
            "label": "Training reward",
            "value": text.change(summary.reward.before, summary.reward.after),
            "note": f"population mean, {done} generations",
        },
        {
            "label": "Time",
            "value": text.duration(summary.seconds),
            "note": f"{text.duration(summary.seconds_per_generation)} per generation",
        },
        {
            "label": "Tokens per second",
            "value": text.number(
                None if summary.tokens_per_second is None else round(summary.tokens_per_second)
            ),
            "note": "generated, median",
        },
        {"label": "Kernel", "value": summary.kernel or text.MISSING, "note": "used throughout"},
    ]


def _training_tiles(summary: TrainingSummary) -> list[dict[str, str]]:
    speed = summary.tokens_per_second
    return [
        {
            "label": "Held-out correct",
            "value": _shares(summary.correct),
            "note": f"{len(summary.pairs)} examples, base → trained",
        },
        {
            "label": "Held-out reward",
            "value": text.change(summary.held_out.before, summary.held_out.after),
            "note": "base → trained",
        },
        {
            "label": "Loss",
            "value": text.change(summary.loss.before, summary.loss.after),
            "note": f"first and last tenth of {summary.done} steps",
        },
        {"label": "Time", "value": text.duration(summary.seconds), "note": "all of it"},
        {
            "label": "Tokens per second",
            "value": text.number(None if speed is None else round(speed)),
            "note": f"trained, median; {text.number(summary.tokens)} in all",
        },
        {"label": "Kernel", "value": summary.kernel or text.MISSING, "note": "of the answers"},
    ]


def _shares(change: Change) -> str:
    if change.before is None and change.after is None:
        return text.MISSING
    return f"{text.share(change.before)} → {text.share(change.after)}"


def _pair_view(pair: Pair, steps: int, unit: str) -> dict[str, Any]:
    after = pair.after
    label = "After"
    if after is not None and after.get("phase") != "after":
        label = f"Latest, {unit} {after.get('generation')}"
    return {
        "example": pair.example,
        "unit": unit,
        "prompt": text.prompt_text(pair.prompt),
        "gold": pair.gold,
        "sides": [("Before", pair.before), (label, after)],
        "timeline": _spread(pair.timeline, steps),
        "evaluations": len(pair.timeline),
    }


def _spread(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most `most` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def _flat(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), text.phrase(value)) for key, value in facts.items()]
