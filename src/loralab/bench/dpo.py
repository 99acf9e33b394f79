"""`loralab bench dpo`: the cost of a step of direct preference optimisation, beside TRL's.

SmolLM2 learns which of two answers of HH-RLHF people preferred, through LoRA. As in `sft`, each way
runs in a process of its own, and they take turns on the same pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loralab.bench import step_page
from loralab.bench.step_page import StepOptions
from loralab.bench.table import Table
from loralab.bench.timing import pin
from loralab.bench.work import Record, Work, write_rows
from loralab.bench.workers import Say, Way, chosen
from loralab.config.dpo import PreferenceDataConfig
from loralab.gradient.dpo import PairRow, prepare_pairs
from loralab.gradient.preferences import Preferences
from loralab.gradient.rows import IGNORED

PAGE = Path("docs/bench-dpo.md")
QUICK: dict[str, Any] = {"laps": 1, "steps": 1, "warm": 0, "pairs": 8}

TRL, FAIR, OURS, NATIVE = "trl", "trl-labelled", "loralab", "loralab-native"
OWN = "loralab.bench.own_steps"

WAYS: Mapping[str, Way] = {
    TRL: Way("TRL DPOTrainer and PEFT", "loralab.bench.trl_peers:dpo"),
    FAIR: Way("the same, head on answer tokens", "loralab.bench.trl_peers:dpo_labelled"),
    OURS: Way("loralab, plain PyTorch", f"{OWN}:dpo"),
    NATIVE: Way("loralab, native kernels", f"{OWN}:dpo_native"),
}


@dataclass(frozen=True)
class Options(StepOptions):
    """pairs: that training goes through."""

    model: str = "smollm2"
    data: str = "../shared/data/hh_rlhf/helpful-base.test.jsonl.gz"
    dtype: str = "bfloat16"
    batch_size: int = 4
    max_length: int = 512
    rank: int = 16
    pairs: int = 512


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
            lr=5e-5,
        )
        _, tokenizer = work.load()
        pairs = Preferences(PreferenceDataConfig(path=options.data), work.seed).pairs("train")
        prepared = prepare_pairs(pairs.pairs[: options.pairs], tokenizer, options.max_length)
        write_rows(Path(work.rows), [as_record(row) for row in prepared.rows])
        done = step_page.measure(
            options,
            ways,
            work,
            {TRL: "TRL", FAIR: "TRL patched"},
            (TRL, OURS, NATIVE),
            say=say,
        )
    tokens = [len(row.input_ids) for pair in prepared.rows for row in (pair.chosen, pair.rejected)]
    facts = step_page.facts(
        core,
        step=(
            f"{options.batch_size} pairs of {options.data}, answers of up to {options.max_length} "
            f"tokens with their prompt (mean {sum(tokens) / len(tokens):.0f}), {options.dtype}, "
            f"{options.model}; LoRA of rank {options.rank} on every linear of the decoder, kept in "
            "float32 (PEFT's default); the reference is the model without it, run in each step; "
            "AdamW, clipping"
        ),
        laps=step_page.laps(options),
    )
    return Table("Preference optimisation benchmark", facts, done.sections, done.data)


def as_record(pair: PairRow) -> Record:
    """A pair as TRL's collator takes it; the two answers have their prompt in common."""
    start = sum(label == IGNORED for label in pair.chosen.labels)
    return {
        "prompt_ids": list(pair.chosen.input_ids[:start]),
        "chosen_ids": list(pair.chosen.input_ids[start:]),
        "rejected_ids": list(pair.rejected.input_ids[start:]),
    }


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(prog="loralab bench dpo", description=__doc__)
    add = step_page.arguments(parser, WAYS, PAGE, curve=True)
    add("--model", help=f"default {default.model}")
    add("--data", metavar="PATH", help=f"pairs, default {default.data}")
    add("--dtype", choices=["bfloat16", "float32"])
    add("--batch-size", type=int, help=f"pairs, default {default.batch_size}")
    add("--max-length", type=int, help=f"tokens of prompt and answer, {default.max_length}")
    add("--rank", type=int, help=f"default {default.rank}")
    add("--pairs", type=int, help=f"that training goes through, default {default.pairs}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    return step_page.main(
        _parser(), argv, PAGE, QUICK, lambda given, say: run(Options(**given), say)
    )
