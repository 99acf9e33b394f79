"""`loralab bench sft`: the cost of a step of supervised fine-tuning, beside its peers, on one core.

SmolLM2 learns GSM8K's solutions through LoRA. Each way to train runs in a process of its own, in
its real training loop; they take turns, on the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from loralab import tasks
from loralab.adapters.targets import linear_weights
from loralab.bench import step_page
from loralab.bench.command import told
from loralab.bench.floor import Gemm, least, lora_flops
from loralab.bench.step_page import Bench, LoraOptions, Prepared
from loralab.bench.table import Section
from loralab.bench.workers import Race, Way
from loralab.gradient import rows as examples
from loralab.gradient.collate import as_record

TRL, FAIR, OURS, NATIVE = "trl", "trl-labelled", "loralab", "loralab-native"
GEMM = "gemm"
OWN_ROWS = (OURS, NATIVE)
PEERS, OWN = "loralab.bench.trl_peers", "loralab.bench.own_steps"

WAYS: Mapping[str, Way] = {
    TRL: Way("TRL SFTTrainer and PEFT", f"{PEERS}:sft"),
    FAIR: Way("the same, head and loss on labelled tokens", f"{PEERS}:sft_labelled"),
    "peft": Way("PEFT in a plain loop, padded", "loralab.bench.plain_loops:peft"),
    "loralab-padded": Way("loralab, padded", f"{OWN}:sft_padded"),
    OURS: Way("loralab, plain PyTorch", f"{OWN}:sft"),
    NATIVE: Way("loralab, native kernels", f"{OWN}:sft_native"),
}


@dataclass(frozen=True)
class Options(LoraOptions):
    """examples: of the training split, that training goes through."""

    data: str = "../shared/data/gsm8k"
    examples: int = 1024


def prepare(options: Options, folder: Path) -> Prepared:
    """The first training examples of the task as rows, and what the floor is reckoned from.

    Raises:
        UserError: a model or data that cannot be loaded.
    """
    work = options.work(folder)
    model, tokenizer = work.load()
    task = tasks.get("gsm8k", path=options.data)
    pairs = [
        (task.prompt(example), task.gold(example) or "", example.id)
        for example in task.examples("train")[: options.examples]
    ]
    rows = examples.prepare(pairs, tokenizer, options.max_length).rows
    work.write([as_record(row) for row in rows], told(options.data))
    lengths = [len(row.input_ids) for row in rows]
    learned = sum(row.learned for row in rows)
    flops = lora_flops(model, options.rank, lengths, learned) / sum(lengths)
    gemm = Gemm(
        max(linear_weights(model).values(), key=lambda weight: weight.numel()),
        sum(lengths[: options.batch_size]),
        getattr(torch, options.dtype),
    )
    step = (
        f"{options.batch_size} rows of {told(options.data)} of up to {options.max_length} tokens "
        f"(mean {fmean(lengths):.0f}, {learned / sum(lengths):.0%} of them learned), "
        f"{options.adapter()}; AdamW, clipping"
    )
    return Prepared(
        work,
        step,
        {GEMM: gemm.lap},
        lambda race: floor(race, flops),
        {"flops_per_token": flops},
    )


def floor(race: Race, flops: float) -> Section:
    """The limit, and how near ours comes."""
    speeds = {
        WAYS[name].label: median(lap.tokens / lap.cpu for lap in race.laps(name))
        for name in OWN_ROWS
        if name in race.peaks
    }
    return least(race.timed[GEMM], flops, speeds)


def _arguments(add: Callable[..., Any], default: Options) -> None:
    default.add_to(add, "folder or file of GSM8K", "row")
    add("--examples", type=int, help=f"of the training split, default {default.examples}")


BENCH = Bench(
    "sft",
    __doc__,
    "Supervised fine-tuning benchmark",
    WAYS,
    {TRL: "TRL", FAIR: "TRL patched"},
    Options,
    _arguments,
    prepare,
    quick={"examples": 16},
    compared=(TRL, OURS, NATIVE),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    return step_page.main(BENCH, argv)
