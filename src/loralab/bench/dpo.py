"""`loralab bench dpo`: the cost of a step of direct preference optimisation, beside TRL's.

SmolLM2 learns which of two answers of HH-RLHF people preferred, through LoRA. As in `sft`, each way
runs in a process of its own, and they take turns on the same pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from loralab.bench import step_page
from loralab.bench.command import told
from loralab.bench.step_page import Bench, LoraOptions, Prepared
from loralab.bench.work import Record
from loralab.bench.workers import Way
from loralab.config.dpo import PreferenceDataConfig
from loralab.gradient.dpo import PairRow, prepare_pairs
from loralab.gradient.preferences import Preferences
from loralab.gradient.rows import IGNORED

TRL, FAIR, OURS, NATIVE = "trl", "trl-labelled", "loralab", "loralab-native"
OWN = "loralab.bench.own_steps"

WAYS: Mapping[str, Way] = {
    TRL: Way("TRL DPOTrainer and PEFT", "loralab.bench.trl_peers:dpo"),
    FAIR: Way("the same, head on answer tokens", "loralab.bench.trl_peers:dpo_labelled"),
    OURS: Way("loralab, plain PyTorch", f"{OWN}:dpo"),
    NATIVE: Way("loralab, native kernels", f"{OWN}:dpo_native"),
}


@dataclass(frozen=True)
class Options(LoraOptions):
    """pairs: that training goes through."""

    data: str = "../shared/data/hh_rlhf/helpful-base.test.jsonl.gz"
    batch_size: int = 4
    pairs: int = 512


def prepare(options: Options, folder: Path) -> Prepared:
    """Pairs of the data.

    Raises:
        UserError: a model or data that cannot be loaded.
    """
    work = options.work(folder, lr=5e-5)
    _, tokenizer = work.load()
    pairs = Preferences(PreferenceDataConfig(path=options.data), work.seed).pairs("train")
    rows = prepare_pairs(pairs.pairs[: options.pairs], tokenizer, options.max_length).rows
    work.write([as_record(row) for row in rows], told(options.data))
    mean = fmean(len(row.input_ids) for pair in rows for row in (pair.chosen, pair.rejected))
    step = (
        f"{options.batch_size} pairs of {told(options.data)}, answers of up to "
        f"{options.max_length} tokens with their prompt (mean {mean:.0f}), {options.adapter()}; "
        "the reference is the model without it, run in each step; AdamW, clipping"
    )
    return Prepared(work, step)


def as_record(pair: PairRow) -> Record:
    """A pair as TRL's collator takes it; the two answers have their prompt in common."""
    start = sum(label == IGNORED for label in pair.chosen.labels)
    return {
        "prompt_ids": list(pair.chosen.input_ids[:start]),
        "chosen_ids": list(pair.chosen.input_ids[start:]),
        "rejected_ids": list(pair.rejected.input_ids[start:]),
    }


def _arguments(add: Callable[..., Any], default: Options) -> None:
    default.add_to(add, "pairs", "pair")
    add("--pairs", type=int, help=f"that training goes through, default {default.pairs}")


BENCH = Bench(
    "dpo",
    __doc__,
    "Preference optimisation benchmark",
    WAYS,
    {TRL: "TRL", FAIR: "TRL patched"},
    Options,
    _arguments,
    prepare,
    quick={"pairs": 8},
    compared=(TRL, OURS, NATIVE),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    return step_page.main(BENCH, argv)
