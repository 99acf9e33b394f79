"""An ablation: the same fine-tuning with one thing changed at a time, with several seeds.

Each run adds one line to metrics.jsonl when it is done; a killed ablation goes on with the first
that is missing. `ablation.md` is the table of what is there so far.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from time import perf_counter, process_time
from typing import Any

import torch

from loralab.adapters.spline_diagnostics import spline_layers
from loralab.adapters.spline_watch import SplineDiagnosticsCallback
from loralab.config import AblationConfig, SftConfig
from loralab.errors import UserError
from loralab.gradient.ablation_table import TABLE, markdown, table
from loralab.gradient.contamination import contaminated_examples
from loralab.gradient.events import OnTrainingEvent, Remark, ignore
from loralab.gradient.fine_tune import trainable
from loralab.gradient.guarded import guards
from loralab.gradient.judge import Judge
from loralab.gradient.loop import NonFiniteError, quiet
from loralab.gradient.rows import Row, rows_of_task
from loralab.gradient.sft import train
from loralab.interrupt import Ended
from loralab.models.load import load
from loralab.rollouts import share_correct
from loralab.run import Run
from loralab.tasks.supervised import task_of

TAIL = 10
"""Steps at the end over which the training loss is averaged."""
SHOWN = 4
"""Held-out completions kept of each run."""


def ablate(
    config: AblationConfig,
    run: Run,
    on_event: OnTrainingEvent = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> Ended:
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
            return Ended(False)
        row = _one(config.config_of(name, seed), name, seed, run, on_event)
        run.log_metrics(row)
        _write_table(config, run)
        on_event(Remark(f"{number} of {len(wanted)}: {name}, seed {seed}: {_said(row)}"))
    return Ended(True)


def _said(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return "failed"
    if row["held_out"] is None:
        return f"held-out reward {row['held_out_reward']:.4g}"
    return f"held-out {row['held_out']:.1%}"


def _one(
    config: SftConfig, name: str, seed: int, run: Run, on_event: OnTrainingEvent
) -> dict[str, Any]:
    """Train and judge one variant with one seed."""
    task = task_of(config)
    leaked = contaminated_examples(task, config.contamination, on_event)
    with quiet():
        model, tokenizer = load(config.model, config.dtype, config.device, config.quantization)
        settings = config.training
        rows = rows_of_task(task, "train", tokenizer, settings.max_length, leaked).rows
        judge = Judge(model, tokenizer, task, config)
        if not judge.batch.examples:
            raise UserError(
                f"task {task.name}: the {config.evaluation.split} split has no examples to judge by"
            )
        held_out = rows_of_task(task, "test", tokenizer, settings.max_length).rows
        trained = trainable(model, tokenizer, config, rows, run)
        watching = SplineDiagnosticsCallback() if spline_layers(trained) else None
        # Each run is looked at on its own: a guard compares with the looks before, in its folder.
        guarded = guards(config, run.path / "guard" / f"{name}-{seed}", tokenizer, on_event)
        callbacks = [*guarded, *([] if watching is None else [watching])]
        cpu, clock = process_time(), perf_counter()
        row: dict[str, Any] = {"variant": name, "seed": seed}
        try:
            history = train(trained, tokenizer, rows, settings, config.seed, callbacks)
            if not history.complete:
                failed = f"stopped after step {len(history.losses)}"
                row |= {"failed": failed, "held_out": None}
        except NonFiniteError as error:
            row |= {"failed": str(error), "held_out": None}
        for guard in guarded:
            row["findings"] = [f"{one.severity} {one.rule}" for one in guard.findings]
        if "failed" in row:
            return row
        row |= {
            "cpu_seconds": process_time() - cpu,
            "seconds": perf_counter() - clock,
            "losses": list(history.losses),
            "loss": fmean(history.losses[-TAIL:]),
            "notes": list(history.notes),
        }
        row["held_out_loss"] = mean_loss(trained, held_out[: config.evaluation.limit])
        rollouts = judge.trained(trained)
        row["held_out"] = share_correct(rollouts)
        row["held_out_reward"] = fmean(r.score.reward for r in rollouts)
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


def _write_table(config: AblationConfig, run: Run) -> None:
    rows = table(config, run.metrics())
    run.write(f"{TABLE}.json", json.dumps(rows, indent=2) + "\n")
    run.write(f"{TABLE}.md", markdown(rows))
