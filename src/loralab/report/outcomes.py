"""Pages of runs that train nothing, or many things: their tables, and what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.gradient.ablation_table import TABLE, cells, header
from loralab.report.stages import measured, millions
from loralab.report.tables import Table, read_json, write_tables
from loralab.report.text import MISSING, number, prompt_text
from loralab.run import Run

MOST_TEXTS = 100
LONGEST = 300
"""Characters of a text in a cell."""


def build_ablation_page(run: Run) -> Path:
    """The variants, and some held-out completions of each.

    Raises:
        UserError: the run is damaged, or the directory cannot be written.
    """
    rows = read_json(run, f"{TABLE}.json") or []
    done = sum(row["seeds"] for row in rows)
    planned = len(run.config["variants"]) * len(run.config["seeds"])
    notices = ["Mean ± standard deviation over seeds."] if done else []
    if done < planned:
        notices.append(f"Unfinished: {done} of {planned} runs so far.")
    texts = [
        [str(row["variant"]), str(row["seed"]), *_text(row)]
        for row in run.completions()[:MOST_TEXTS]
    ]
    return write_tables(
        run,
        notices,
        [
            Table("Variants", header(rows), cells(rows)),
            Table("Held-out completions", ["variant", "seed", *_TEXT], texts),
        ],
    )


def build_eval_page(run: Run) -> Path:
    """Models and what was measured of each. Raises UserError as `build_ablation_page`."""
    found = {(row["model"], row["measure"]): row for row in run.metrics()}
    models, measures = list(run.config["models"]), list(run.config["measures"])
    rows = []
    for model in models:
        mine = [found.get((model, one)) for one in measures]
        parameters = next((row["parameters"] for row in mine if row), None)
        row = [model, millions(parameters), *(measured(_flat(one)) for one in mine)]
        rows.append(row)
    missing = len(models) * len(measures) - len(found)
    return write_tables(
        run,
        [f"Unfinished: {missing} measurements are missing."] if missing else [],
        [Table("Models", ["model", "parameters", *measures], rows)],
    )


def build_scores_page(run: Run) -> Path:
    """What `loralab eval` wrote. Raises UserError as `build_ablation_page`."""
    scores: list[list[str]] = []
    for row in run.metrics():
        few = "" if row.get("shots") is None else f", {row['shots']} shots"
        named = f"{row['task']}, {row['split']}{few}"
        for name, one in row.get("scores", {}).items():
            error = "" if one.get("error") is None else f" ± {number(one['error'])}"
            scores.append([named, name, number(one["value"]) + error])
        if "perplexity" in row:
            scores.append([named, "perplexity", number(row["perplexity"])])
    texts = [
        [str(row["example"]), _cut(prompt_text(row["prompt"])), *_text(row)[1:]]
        for row in run.completions()[:MOST_TEXTS]
    ]
    return write_tables(
        run,
        [],
        [
            Table("Scores", ["task", "score", "value ± standard error"], scores),
            Table("Completions", ["example", "prompt", *_TEXT[1:]], texts),
        ],
    )


def build_distillation_page(run: Run) -> Path:
    """What a teacher wrote, and how much of it was kept. Raises UserError as the others."""
    rows = run.metrics()
    columns = ("step", "completions", "kept", "solved", "cut", "failed")
    return write_tables(
        run,
        [],
        [
            Table(
                "Completions so far, batch by batch",
                ["batch", *columns[1:]],
                [[str(row[key]) for key in columns] for row in rows],
            )
        ],
    )


_TEXT: Sequence[str] = ("example", "completion", "correct")


def _text(row: Mapping[str, Any]) -> list[str]:
    right = {True: "✓", False: "✗"}.get(row.get("correct"), MISSING)  # type: ignore[arg-type]
    return [str(row["example"]), _cut(str(row["completion"])), right]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _flat(row: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if row is None else {**row, **row.get("metrics", {})}
