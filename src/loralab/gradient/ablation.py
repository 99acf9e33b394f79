"""An ablation: the same fine-tuning with one thing changed at a time, with several seeds.

Each run adds one line to metrics.jsonl when it is done; a killed ablation goes on with the first
that is missing. `ablation.md` is the table of what is there so far.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from time import perf_counter, process_time
from typing import Any

import torch

from loralab.adapters.spline_diagnostics import spline_layers
from loralab.adapters.spline_watch import SplineDiagnosticsCallback
from loralab.config import AblationConfig, SftConfig
from loralab.gradient.events import OnTrainingEvent, Remark, ignore
from loralab.gradient.fine_tune import trainable
from loralab.gradient.judge import Judge
from loralab.gradient.loop import NonFiniteError, quiet
from loralab.gradient.rows import Row, rows_of_task
from loralab.gradient.sft import train
from loralab.models.load import load
from loralab.run import Run
from loralab.tasks.supervised import task_of

TAIL = 10
"""Steps at the end over which the training loss is averaged."""
SHOWN = 4
"""Held-out completions kept of each run."""


@dataclass(frozen=True)
class Ablated:
    """complete: False if it stopped at a signal."""

    complete: bool


def ablate(
    config: AblationConfig,
    run: Run,
    on_event: OnTrainingEvent = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> Ablated:
    """Make every run of an ablation that its directory does not hold yet, seed by seed.

    Raises:
        UserError: something the user can mend; the runs that are done are kept.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    done = {(row["variant"], row["seed"]) for row in run.metrics() if "variant" in row}
    wanted = [(v.name, seed) for seed in config.seeds for v in config.variants]
    for number, (name, seed) in enumerate(wanted, 1):
        if (name, seed) in done:
            continue
        if stopping():
            return Ablated(False)
        row = _one(config.config_of(name, seed), name, seed, run)
        run.log_metrics(row)
        _write_table(config, run)
        score = f"held-out {row['held_out']:.1%}" if row["held_out"] is not None else "failed"
        on_event(Remark(f"{number} of {len(wanted)}: {name}, seed {seed}: {score}"))
    return Ablated(True)


def _one(config: SftConfig, name: str, seed: int, run: Run) -> dict[str, Any]:
    """Train and judge one variant with one seed."""
    with quiet():
        model, tokenizer = load(config.model, config.dtype, config.device)
        task = task_of(config)
        settings = config.training
        rows = rows_of_task(task, "train", tokenizer, settings.max_length).rows
        judge = Judge(model, tokenizer, task, config)
        held_out = rows_of_task(task, "test", tokenizer, settings.max_length).rows
        trained = trainable(model, tokenizer, config, rows, run)
        watching = SplineDiagnosticsCallback() if spline_layers(trained) else None
        callbacks = [] if watching is None else [watching]
        cpu, clock = process_time(), perf_counter()
        row: dict[str, Any] = {"variant": name, "seed": seed}
        try:
            history = train(trained, tokenizer, rows, settings, config.seed, callbacks)
        except NonFiniteError as error:
            return row | {"failed": str(error), "held_out": None}
        row |= {
            "cpu_seconds": process_time() - cpu,
            "seconds": perf_counter() - clock,
            "losses": list(history.losses),
            "loss": fmean(history.losses[-TAIL:]),
            "notes": list(history.notes),
        }
        row["held_out_loss"] = mean_loss(trained, held_out[: config.evaluation.limit])
        rollouts = judge.trained(trained)
        row["held_out"] = fmean(float(bool(r.score.correct)) for r in rollouts)
        row["answered"] = fmean(r.score.parts.get("answered", 1.0) for r in rollouts)
        row["spline"] = None if watching is None else watching.history[-1]
        row["spline_during"] = [] if watching is None else watching.history
    run.log_completions(
        [
            {
                "variant": name,
                "seed": seed,
                "example": r.example.id,
                "completion": r.text,
                "correct": r.score.correct,
            }
            for r in rollouts[:SHOWN]
        ]
    )
    return row


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[Row]) -> float:
    """Mean negative log-likelihood, in nats a learned token, fp32, one row at a time."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    for row in rows:
        ids = torch.tensor([row.input_ids], device=device)
        labels = torch.tensor(row.labels, device=device)[1:]
        learned = labels >= 0
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1][learned].float()
        losses = torch.nn.functional.cross_entropy(logits, labels[learned], reduction="sum")
        total, count = total + float(losses), count + int(learned.sum())
    return total / max(count, 1)


def table(config: AblationConfig, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, a row for each variant that has a run."""
    made = []
    for variant in config.variants:
        mine = [row for row in rows if row.get("variant") == variant.name]
        good = [row for row in mine if row["held_out"] is not None]
        if not mine:
            continue
        made.append(
            {
                "variant": variant.name,
                "says": variant.says,
                "seeds": len(mine),
                "failed": len(mine) - len(good),
                **{
                    key: _mean_sd([row[key] for row in good])
                    for key in ("held_out", "answered", "held_out_loss", "loss", "cpu_seconds")
                },
                **{key: _of_splines(good, key) for key in ("deviation", "outside")},
            }
        )
    return made


def _of_splines(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    splines = [row["spline"] for row in rows if row.get("spline")]
    return _mean_sd([spline[key] for spline in splines if key in spline])


def _mean_sd(values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _write_table(config: AblationConfig, run: Run) -> None:
    rows = table(config, [row for row in run.metrics() if "variant" in row])
    run.write("ablation.json", json.dumps(rows, indent=2) + "\n")
    run.write("ablation.md", markdown(rows))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as it stands in docs; mean ± standard deviation over seeds."""
    lines = [
        "| variant | change | held-out correct | answered | held-out loss | training loss "
        "| spline moved | outside grid | processor s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            row["variant"],
            row["says"] + (f" ({row['failed']} of {row['seeds']} failed)" if row["failed"] else ""),
            _cell(row["held_out"], 100, 1, " %"),
            _cell(row["answered"], 100, 0, " %"),
            _cell(row["held_out_loss"], 1, 4, ""),
            _cell(row["loss"], 1, 4, ""),
            _cell(row["deviation"], 1, 4, ""),
            _cell(row["outside"], 100, 1, " %"),
            _cell(row["cpu_seconds"], 1, 0, ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(pair: Sequence[float] | None, by: float, digits: int, unit: str) -> str:
    if pair is None:
        return "-"
    return f"{pair[0] * by:.{digits}f} ± {pair[1] * by:.{digits}f}{unit}"
