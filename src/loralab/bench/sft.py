"""`loralab bench sft`: the cost of a step of supervised fine-tuning, beside its peers, on one core.

SmolLM2 learns GSM8K's solutions through LoRA. Each way to train runs in a process of its own, in
its real training loop; they take turns, on the same rows in the same order.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loralab import tasks
from loralab.adapters.targets import linear_weights
from loralab.bench import step_page
from loralab.bench.floor import Gemm, least, lora_flops
from loralab.bench.step_page import StepOptions
from loralab.bench.table import Section, Table
from loralab.bench.timing import pin
from loralab.bench.work import Work, write_rows
from loralab.bench.workers import Race, Say, Way, chosen
from loralab.gradient.collate import as_record
from loralab.gradient.rows import Row, prepare

PAGE = Path("docs/bench-sft.md")
QUICK: dict[str, Any] = {"laps": 1, "steps": 1, "warm": 0, "examples": 16}

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
class Options(StepOptions):
    """examples: of the training split, that training goes through."""

    model: str = "smollm2"
    data: str = "../shared/data/gsm8k"
    dtype: str = "bfloat16"
    batch_size: int = 8
    max_length: int = 512
    rank: int = 16
    examples: int = 1024


def run(options: Options, say: Say = lambda _: None) -> Table:
    """Measure, and make the table.

    Raises:
        UserError: an unknown way, or a model or data that cannot be loaded.
    """
    ways = chosen(options.ways, WAYS)
    core = pin(options.core)
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        work = Work(
            model=options.model,
            dtype=options.dtype,
            rows=f"{folder}/rows.json",
            steps=options.total,
            batch_size=options.batch_size,
            max_length=options.max_length,
            rank=options.rank,
        )
        model, tokenizer = work.load()
        rows = rows_of(options, tokenizer)
        write_rows(Path(work.rows), [as_record(row) for row in rows])
        lengths = [len(row.input_ids) for row in rows]
        learned = sum(row.learned for row in rows)
        flops = lora_flops(model, options.rank, lengths, learned) / sum(lengths)
        gemm = Gemm(
            max(linear_weights(model).values(), key=lambda weight: weight.numel()),
            sum(lengths[: options.batch_size]),
            getattr(torch, options.dtype),
        )
        del model
        done = step_page.measure(
            options,
            ways,
            work,
            {TRL: "TRL", FAIR: "TRL patched"},
            (TRL, OURS, NATIVE),
            {GEMM: gemm.lap},
            say,
        )
    sections = list(done.sections)
    if done.race is not None:
        sections.insert(1, _floor(done.race, flops))
    facts = step_page.facts(
        core,
        step=(
            f"{options.batch_size} rows of {options.data} of up to {options.max_length} tokens "
            f"(mean {sum(lengths) / len(lengths):.0f}, {learned / sum(lengths):.0%} of them "
            f"learned), {options.dtype}, {options.model}; LoRA of rank {options.rank} on every "
            "linear of the decoder, kept in float32 (PEFT's default); AdamW, clipping"
        ),
        laps=step_page.laps(options),
    )
    data = {"flops_per_token": flops, **done.data}
    return Table("Supervised fine-tuning benchmark", facts, sections, data)


def rows_of(options: Options, tokenizer: Any) -> list[Row]:
    """The first training examples of the task as rows."""
    task = tasks.get("gsm8k", path=options.data)
    pairs = [
        (task.prompt(example), task.gold(example) or "", example.id)
        for example in task.examples("train")[: options.examples]
    ]
    return list(prepare(pairs, tokenizer, options.max_length).rows)


def _floor(done: Race, flops: float) -> Section:
    """The limit, and how near the fastest of ours comes."""
    speeds = {
        WAYS[name].label: median(lap.tokens / lap.cpu for lap in done.laps(name))
        for name in OWN_ROWS
        if name in done.peaks
    }
    return least(done.timed[GEMM], flops, speeds)


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(prog="loralab bench sft", description=__doc__)
    add = step_page.arguments(parser, WAYS, PAGE, curve=True)
    add("--model", help=f"default {default.model}")
    add("--data", metavar="PATH", help=f"folder or file of GSM8K, default {default.data}")
    add("--dtype", choices=["bfloat16", "float32"])
    add("--batch-size", type=int, help=f"default {default.batch_size}")
    add("--max-length", type=int, help=f"tokens of a row, default {default.max_length}")
    add("--rank", type=int, help=f"default {default.rank}")
    add("--examples", type=int, help=f"of the training split, default {default.examples}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    return step_page.main(
        _parser(), argv, PAGE, QUICK, lambda given, say: run(Options(**given), say)
    )
