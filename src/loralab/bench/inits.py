"""`loralab bench inits`: every initialisation x three trainings x seeds, on SmolLM2.

A trial is one initialisation with one seed. Each adds a line to WORK/trials.jsonl when it is done,
in the JSON schema of PEFT's method_comparison with our columns under `loralab`; a stopped
benchmark goes on with the first that is missing, and the table is of what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from loralab import durable
from loralab.bench.init_trial import Budget, Kind, Lab, run_trial
from loralab.bench.table import Cell, Section, Table
from loralab.bench.timing import machine, versions
from loralab.errors import UserError

PAGE = Path("docs/bench-inits.md")
KINDS = (
    Kind("zero_b", "zero_b"),
    Kind("gaussian (PEFT)", "gaussian"),
    Kind("tiny", "tiny"),
    Kind("random", "random"),
    Kind("orthogonal", "orthogonal"),
    Kind("orthogonal_negative", "orthogonal_negative"),
    Kind("output_match", "output_match"),
    Kind("output_match, gradient", "output_match", {"method": "gradient"}),
    Kind("svd_delta", "svd_delta", {"reference": lambda lab: lab.merged_reference}),
    Kind("warm_start", "warm_start", {"path": lambda lab: str(lab.reference)}),
    Kind("progressive", "progressive", {"steps": 6}, evolves=False),
    Kind("pissa", "pissa"),
    Kind("olora", "olora"),
    Kind("eva", "eva"),
    Kind("corda", "corda"),
    Kind("lora_ga", "lora_ga"),
    Kind("mica", "mica", evolves=False),
    Kind("loftq (base becomes nf4)", "loftq", evolves=False),
    Kind("nf4 base: zero_b", "zero_b", quantization="nf4", evolves=False),
    Kind(
        "nf4 base: loftq", "loftq", {"reference": lambda lab: lab.full_precision}, "nf4", False
    ),
    Kind(
        "nf4 base: quantization_match",
        "quantization_match",
        {"reference": lambda lab: lab.full_precision},
        "nf4",
        False,
    ),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, measure, write the page and its JSON."""
    parser = argparse.ArgumentParser(prog="loralab bench inits", description=__doc__)
    parser.add_argument("--gsm8k", default="openai/gsm8k", metavar="PATH", help="file, folder, hub")
    parser.add_argument("--wikitext", required=True, metavar="FILE", help="WikiText-2 test.txt")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--inits", metavar="A,B", help="labels of rows; default all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", default="runs/bench-inits", metavar="DIR")
    parser.add_argument("--page", default=str(PAGE), metavar="FILE")
    parser.add_argument("--table-only", action="store_true", help="of the trials that are there")
    arguments = parser.parse_args(argv)
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    log, budget = work / "trials.jsonl", Budget()
    if not arguments.table_only:
        kinds = _chosen(arguments.inits)
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        lab = Lab(arguments.model, arguments.gsm8k, Path(arguments.wikitext), budget)
        _measure(lab, kinds, seeds, log)
    trials = _read(log)
    command = "loralab bench inits " + " ".join(_without_machine(argv or sys.argv[1:]))
    table(trials, budget, command).write(Path(arguments.page))
    print(f"{len(trials)} trials; {arguments.page}")
    return 0


def _chosen(labels: str | None) -> Sequence[Kind]:
    if labels is None:
        return KINDS
    known = {kind.label: kind for kind in KINDS}
    wanted = [label.strip() for label in labels.split(";" if ";" in labels else ",")]
    if missing := [label for label in wanted if label not in known]:
        raise UserError(f"no row {missing[0]!r}; rows: {'; '.join(known)}")
    return [known[label] for label in wanted]


def _measure(lab: Lab, kinds: Sequence[Kind], seeds: Sequence[int], log: Path) -> None:
    done = {(t["loralab"]["label"], t["loralab"]["seed"]) for t in _read(log)}
    wanted = [(kind, seed) for seed in seeds for kind in kinds]
    for number, (kind, seed) in enumerate(wanted, 1):
        if (kind.label, seed) in done:
            continue
        row = run_trial(lab, kind, seed)
        durable.append_line(log, record(lab, kind, row))
        print(
            f"{number} of {len(wanted)}: {kind.label}, seed {seed}: KL {row['kl_0']:.2g}, "
            f"held-out loss {row['held_out_loss']:.4f}, {row['seconds']:.0f} s",
            flush=True,
        )


def record(lab: Lab, kind: Kind, row: Mapping[str, Any]) -> dict[str, Any]:
    """A trial in the schema of PEFT's method_comparison (its README), ours under `loralab`."""
    budget = lab.budget
    training = lab.training()
    return {
        "run_info": {
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "total_time": row["seconds"],
            "experiment_name": f"lora/{lab.model_name}-rank{budget.rank}-{kind.label}",
            "peft_branch": "released",
            "train_config": {
                "model_id": lab.model_name,
                "dtype": "bfloat16",
                "max_seq_length": training.max_length,
                "batch_size": training.batch_size,
                "max_steps": training.steps,
                "seed": row["seed"],
                "grad_norm_clip": training.max_grad_norm,
                "optimizer_type": "AdamW",
                "optimizer_kwargs": {"lr": training.lr, "weight_decay": training.weight_decay},
                "lr_scheduler": training.schedule,
            },
            "peft_config": {
                "peft_type": "LORA",
                "r": budget.rank,
                "lora_alpha": budget.alpha,
                "target_modules": "all-linear",
                "init_lora_weights": kind.init,
            },
            "error_msg": "",
        },
        "train_info": {
            "train_time": row["train_cpu_seconds"],
            "num_total_params": sum(p.numel() for p in lab.base[0].parameters()),
            "status": "success",
            "metrics": [
                {"step": step, "train loss": loss, "grad norm": norm}
                for step, (loss, norm) in enumerate(
                    zip(row["losses"], row["grad_norms"], strict=True), 1
                )
            ]
            + [
                {
                    "step": training.steps,
                    "valid loss": row["held_out_loss"],
                    "test accuracy": row["gsm8k"],
                }
            ],
        },
        "meta_info": {
            "model_info": {"model": lab.model_name},
            "dataset_info": {"gsm8k": "train and test"},
            "package_info": versions("loralab", "peft", "transformers", "torch", "trl"),
            "system_info": {"machine": machine()},
        },
        "loralab": dict(row),
    }


def table(trials: Sequence[Mapping[str, Any]], budget: Budget, command: str) -> Table:
    """The page: step 0, fine-tuning, evolution; mean ± standard deviation over seeds."""
    rows = [trial["loralab"] for trial in trials]
    labels = [kind.label for kind in KINDS if any(r["label"] == kind.label for r in rows)]
    by = {label: [r for r in rows if r["label"] == label] for label in labels}
    first = [
        [
            label, _mean(by[label], "kl_0"), _share(by[label], "agreement_0"),
            _mean(by[label], "wiki_perplexity_0"), _mean(by[label], "own_text_nats"),
            _share(by[label], "garbled"),
            _mean(by[label], "relative_size"), _mean(by[label], "init_cpu_seconds"),
        ]
        for label in labels
    ]  # fmt: skip
    tuned = [
        [
            label, _at_step(by[label], 4), _at_step(by[label], 8), _at_step(by[label], 12),
            _pm(by[label], "held_out_loss", 4), _share(by[label], "gsm8k_form"),
            _share(by[label], "gsm8k"), _mean(by[label], "effective_rank"),
            _pm(by[label], "forgetting", 4), _mean(by[label], "train_cpu_seconds"),
        ]
        for label in labels
    ]  # fmt: skip
    evolved = [
        [
            label,
            *(_inner(by[label], "conciseness", k) for k in ("start", "final", "train_last")),
            *(_inner(by[label], "countdown", k) for k in ("start", "final", "train_last")),
        ]
        for label in labels
        if any(r.get("conciseness") for r in by[label])
    ]
    seeds = sorted({r["seed"] for r in rows})
    facts = {
        "Command": f"`{command}`",
        "Machine": machine(),
        "Seeds": ", ".join(map(str, seeds)),
        "Trials": ", ".join(f"{label} {len(by[label])}" for label in labels),
        "Budget": ", ".join(f"{k} {v}" for k, v in asdict(budget).items()),
        "Versions": ", ".join(f"{k} {v}" for k, v in versions("peft", "torch", "trl").items()),
    }
    sections = (
        Section(
            "At step 0",
            "KL from the true base (nats a token, GSM8K test text), agreement of the most likely "
            "token, perplexity on WikiText-2, nats a token that the base gives to what the start "
            f"writes ({_number(rows, 'own_text_nats_of_base')} to its own), share of seeds whose "
            "text is garbled, ||s BA|| / ||W||, processor seconds of the initialisation.",
            ("start", "KL", "top-1", "perplexity", "own text", "garbled", "size", "init s"),
            first,
        ),
        Section(
            "SFT on GSM8K",
            "Training loss at fixed steps, loss on held-out solutions after, share of answers in "
            "GSM8K's form and right, effective rank of the change, change of the loss on "
            "WikiText-2 (forgetting), processor seconds of training.",
            (
                "start",
                "loss 4",
                "loss 8",
                "loss 12",
                "held-out loss",
                "form",
                "right",
                "eff. rank",
                "forgetting",
                "train s",
            ),
            tuned,
        ),
        Section(
            "Evolution",
            "Held-out reward before and after, and training reward in the last generation: on "
            "conciseness from the start itself, on countdown after an SFT warm start from it.",
            (
                "start",
                "concise. before",
                "after",
                "train",
                "countdown before",
                "after",
                "train",
            ),
            evolved,
            ("Absent rows: what evolution refuses (A = 0, a schedule, a replaced base).",),
        ),
    )
    return Table("Initialisations side by side", facts, sections, {"trials": list(trials)})


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return fmean(values) if values else None


def _number(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    value = _mean(rows, key)
    return "-" if value is None else f"{value:.2f}"


def _share(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    value = _mean(rows, key)
    return "-" if value is None else f"{value:.0%}"


def _pm(rows: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    return _spread([row[key] for row in rows if row.get(key) is not None], digits)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.{digits}f} ± {spread:.{digits}f}"


def _at_step(rows: Sequence[Mapping[str, Any]], step: int) -> Cell:
    values = [row["losses"][step - 1] for row in rows if len(row["losses"]) >= step]
    return fmean(values) if values else None


def _inner(rows: Sequence[Mapping[str, Any]], outer: str, key: str) -> str:
    digits = 1 if outer == "conciseness" else 3
    return _spread([row[outer][key] for row in rows if row.get(outer)], digits)


def _read(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line]


def _without_machine(words: Sequence[str]) -> list[str]:
    """The command with the paths of this machine cut to their last part."""
    return [Path(word).name if os.sep in word else word for word in words]
