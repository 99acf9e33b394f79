"""`loralab bench inits`: every initialisation x three trainings x seeds, on SmolLM2.

A trial is one initialisation with one seed. Each adds a line to WORK/trials.jsonl when it is done,
in the JSON schema of PEFT's method_comparison with our columns under `loralab`; a stopped
benchmark goes on with the first that is missing. The table is of the trials that the page holds
already and of those made now, which take the place of their like; all are of one setting (model,
data, budget).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loralab import durable
from loralab.bench.command import told
from loralab.bench.init_lab import KINDS, Budget, Kind, Lab
from loralab.bench.init_memory import peak_alone
from loralab.bench.init_table import published, table
from loralab.bench.init_trial import run_trial
from loralab.bench.table import around
from loralab.bench.timing import machine, versions
from loralab.errors import UserError

PAGE = Path("docs/initialisation.md")
_TRIALS, _MEMORY = "trials.jsonl", "memory.jsonl"

Trial = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, measure, write the page and its JSON."""
    words = list(sys.argv[1:] if argv is None else argv)
    given = _parser().parse_args(words)
    work, page = Path(given.work), Path(given.page)
    work.mkdir(parents=True, exist_ok=True)
    around(page)
    kinds = _chosen(given.inits)
    shown: list[Trial] = published(page, "trials", [])
    peaks: dict[str, float] = published(page, "peak_gb", {})
    if given.table_only:
        made = durable.read_lines(work / _TRIALS)
        setting = _setting(made[-1]) if made else {}
    else:
        lab = _lab(given)
        setting = lab.setting
        if shown and (other := _differing(setting, _setting(shown[0]))):
            raise UserError(
                f"{page} holds trials of another {' and '.join(other)}; choose another --page"
            )
        if given.memory:
            _measure_memory(lab, kinds, work / _MEMORY)
        else:
            seeds = [int(seed) for seed in given.seeds.split(",")]
            command = shlex.join(["loralab", "bench", "inits", *map(told, words)])
            _measure(lab, kinds, seeds, work / _TRIALS, command)
    if shown:
        setting = _setting(shown[0])
    trials = _merged(shown, _of(setting, durable.read_lines(work / _TRIALS)))
    if not trials:
        raise UserError(f"no trials in {work}, nor behind {page}: run bench inits without options")
    measured = _of(setting, durable.read_lines(work / _MEMORY))
    own = {row["label"]: row["peak_gb"] for row in measured}
    table(trials, peaks | own).write(page)
    print(f"{len(trials)} trials; {page}")
    return 0


def _parser() -> argparse.ArgumentParser:
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
    return parser


def _lab(given: argparse.Namespace) -> Lab:
    if given.memory:
        return Lab(given.model, given.gsm8k, Path(), Budget())
    if given.wikitext is None:
        raise UserError("bench inits: --wikitext is missing; expected WikiText-2's test.txt")
    if not Path(given.wikitext).is_file():
        raise UserError(f"--wikitext {given.wikitext} is no file; expected WikiText-2's test.txt")
    return Lab(given.model, given.gsm8k, Path(given.wikitext), Budget())


def _setting(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a trial, or of a line of memory."""
    found: Mapping[str, Any] = row.get("loralab", row).get("setting", {})
    return found


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What of two settings is not the same; what one of them had no part in (None) is."""
    return [
        key
        for key, value in one.items()
        if key not in other or (None not in (value, other[key]) and value != other[key])
    ]


def _of(setting: Mapping[str, Any], rows: Sequence[Trial]) -> list[Trial]:
    return [row for row in rows if setting and not _differing(setting, _setting(row))]


def _merged(*trials: Sequence[Trial]) -> list[Trial]:
    """One trial of each start and seed, the last one."""
    found = {(t["loralab"]["label"], t["loralab"]["seed"]): t for part in trials for t in part}
    return list(found.values())


def _chosen(labels: str | None) -> Sequence[Kind]:
    if labels is None:
        return KINDS
    known = {kind.label: kind for kind in KINDS}
    wanted = [label.strip() for label in labels.split(";" if ";" in labels else ",")]
    if missing := [label for label in wanted if label not in known]:
        raise UserError(f"no row {missing[0]!r}; rows: {'; '.join(known)}")
    return [known[label] for label in wanted]


def _measure(
    lab: Lab, kinds: Sequence[Kind], seeds: Sequence[int], log: Path, command: str
) -> None:
    durable.cut_torn_line(log)
    made = _of(lab.setting, durable.read_lines(log))
    done = {(trial["loralab"]["label"], trial["loralab"]["seed"]) for trial in made}
    wanted = [(kind, seed) for seed in seeds for kind in kinds]
    for number, (kind, seed) in enumerate(wanted, 1):
        if (kind.label, seed) in done:
            continue
        row = run_trial(lab, kind, seed)
        durable.append_line(log, record(lab, kind, row, command))
        print(
            f"{number} of {len(wanted)}: {kind.label}, seed {seed}: KL {row['kl_0']:.2g}, "
            f"held-out loss {row['held_out_loss']:.4f}, {row['seconds']:.0f} s",
            flush=True,
        )


def _measure_memory(lab: Lab, kinds: Sequence[Kind], log: Path) -> None:
    durable.cut_torn_line(log)
    done = {row["label"] for row in _of(lab.setting, durable.read_lines(log))}
    # What a reference was trained to does not change the memory of a start from it.
    brief = replace(lab, budget=replace(lab.budget, sft_steps=1))
    for number, kind in enumerate(kinds, 1):
        if kind.label not in done:
            peak = peak_alone(brief, kind)
            row = {"label": kind.label, "peak_gb": peak, "setting": lab.setting}
            durable.append_line(log, row)
            print(f"{number} of {len(kinds)}: {kind.label}: {peak:.2f} GB", flush=True)


def record(lab: Lab, kind: Kind, row: Mapping[str, Any], command: str) -> dict[str, Any]:
    """A trial in the schema of PEFT's method_comparison (its README), ours under `loralab`: what
    was measured, in which setting, by which command."""
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
        "loralab": {**row, "setting": lab.setting, "command": command},
    }
