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
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loralab import durable
from loralab.bench.init_lab import KINDS, Budget, Kind, Lab
from loralab.bench.init_memory import peak_in_child
from loralab.bench.init_table import command_on, published, table, write
from loralab.bench.init_trial import run_trial
from loralab.bench.timing import machine, versions
from loralab.errors import UserError

PAGE = Path("docs/initialisation.md")
_TRIALS, _MEMORY = "trials.jsonl", "memory.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, measure, write the page and its JSON."""
    parser = argparse.ArgumentParser(prog="loralab bench inits", description=__doc__)
    parser.add_argument("--gsm8k", default="openai/gsm8k", metavar="PATH", help="file, folder, hub")
    parser.add_argument("--wikitext", metavar="FILE", help="WikiText-2 test.txt; trials need it")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--inits", metavar="A,B", help="labels of rows; default all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", default="runs/bench-inits", metavar="DIR")
    parser.add_argument("--page", default=str(PAGE), metavar="FILE")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--memory", action="store_true", help="peak memory of each row, in a process of its own"
    )
    instead.add_argument("--table-only", action="store_true", help="of the trials that are there")
    given = parser.parse_args(argv)
    work, page = Path(given.work), Path(given.page)
    work.mkdir(parents=True, exist_ok=True)
    kinds, budget, command = _chosen(given.inits), Budget(), None
    if given.memory:
        # What a reference was trained to does not change the memory of a start from it.
        brief = replace(budget, sft_steps=1)
        _measure_memory(Lab(given.model, given.gsm8k, Path(), brief), kinds, work / _MEMORY)
    elif not given.table_only:
        if given.wikitext is None:
            raise UserError("bench inits: --wikitext is missing; expected WikiText-2's test.txt")
        seeds = [int(seed) for seed in given.seeds.split(",")]
        lab = Lab(given.model, given.gsm8k, Path(given.wikitext), budget)
        _measure(lab, kinds, seeds, work / _TRIALS)
        command = "`loralab bench inits " + " ".join(_without_machine(argv or sys.argv[1:])) + "`"
    trials = _read(work / _TRIALS) or published(page, "trials", [])
    peaks = {row["label"]: row["peak_gb"] for row in _read(work / _MEMORY)}
    peaks = published(page, "peak_gb", {}) | peaks
    write(table(trials, peaks, budget, command or command_on(page)), page)
    print(f"{len(trials)} trials; {page}")
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


def _measure_memory(lab: Lab, kinds: Sequence[Kind], log: Path) -> None:
    done = {row["label"] for row in _read(log)}
    for number, kind in enumerate(kinds, 1):
        if kind.label not in done:
            peak = peak_in_child(lab, kind)
            durable.append_line(log, {"label": kind.label, "peak_gb": peak})
            print(f"{number} of {len(kinds)}: {kind.label}: {peak:.2f} GB", flush=True)


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


def _read(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line]


def _without_machine(words: Sequence[str]) -> list[str]:
    """The command with the paths of this machine cut to their last part."""
    return [Path(word).name if os.sep in word else word for word in words]
