"""`loralab bench pretrain`: the cost of a step of pretraining the small decoder, beside its peers.

The decoder, Transformers' Llama of the same shape and a GPT in the manner of nanoGPT read the same
rows of stories, all weights trained; each in a process of its own, taking turns on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loralab import config as configs
from loralab.bench import step_page
from loralab.bench.step_page import StepOptions
from loralab.bench.table import Table
from loralab.bench.timing import pin
from loralab.bench.work import Work, write_rows
from loralab.bench.workers import Say, Way, chosen
from loralab.config import PretrainConfig
from loralab.errors import UserError
from loralab.gradient.collate import as_record
from loralab.gradient.corpus import read_corpus
from loralab.gradient.loop import quiet
from loralab.gradient.pretrain import build, tokenizer_of
from loralab.gradient.stream import rows_of, shuffled

PAGE = Path("docs/bench-pretrain.md")
QUICK: dict[str, Any] = {"laps": 1, "steps": 1, "warm": 0}

LLAMA, NANO, OURS, NATIVE = "llama", "nano", "loralab", "loralab-native"
OWN = "loralab.bench.own_steps"

WAYS: Mapping[str, Way] = {
    LLAMA: Way("Transformers' Llama in a plain loop", "loralab.bench.plain_loops:llama"),
    NANO: Way("a GPT in the manner of nanoGPT", "loralab.bench.plain_loops:nano"),
    OURS: Way("loralab, plain PyTorch", f"{OWN}:pretrain"),
    NATIVE: Way("loralab, native kernels", f"{OWN}:pretrain_native"),
}


@dataclass(frozen=True)
class Options(StepOptions):
    """config: of the decoder, its tokenizer and its batches. dtype: of the products; weights are in
    float32.
    """

    config: str = "pretrain-tiny"
    data: str = "../shared/data/tinystories/tinystories_train_head_2MiB.txt.gz"
    dtype: str = "float32"
    rows: int = 1024
    steps: int = 10
    warm: int = 2


def run(options: Options, say: Say = lambda _: None) -> Table:
    """Measure, and make the table.

    Raises:
        UserError: an unknown way, a config of another kind, or text that cannot be read.
    """
    ways = chosen(options.ways, WAYS)
    core = pin(options.core)
    torch.set_num_threads(1)
    config = configs.load(options.config, [f"corpus.0.path={options.data}"])
    if not isinstance(config, PretrainConfig):
        raise UserError(f"config {options.config} is of kind {config.kind}; expected pretrain")
    training = config.training
    with TemporaryDirectory() as folder:
        work = Work(
            model=f"{folder}/model",
            dtype=options.dtype,
            rows=f"{folder}/rows.json",
            steps=options.total,
            batch_size=training.batch_size,
            max_length=training.max_length,
            lr=training.lr,
        )
        parameters = _prepare(config, work, options.rows)
        done = step_page.measure(options, ways, work, {LLAMA: "Llama", NANO: "nanoGPT"}, say=say)
    facts = step_page.facts(
        core,
        step=(
            f"{training.batch_size} rows of {training.max_length} tokens of "
            f"{Path(options.data).name}, {options.dtype}; {config.name}, {parameters:,} weights, "
            f"{config.decoder.attention} attention; AdamW, clipping"
        ),
        laps=step_page.laps(options),
    )
    return Table("Pretraining benchmark", facts, done.sections, done.data)


def _prepare(config: PretrainConfig, work: Work, count: int) -> int:
    """Write the decoder, its tokenizer and whole rows; how many parameters it has."""
    [source] = read_corpus(config.corpus[:1])
    place = Path(work.model)
    tokenizer = tokenizer_of(config, place, (document.whole for document in source.train))
    documents = shuffled(source.train, config.seed)
    rows = rows_of(source, documents, tokenizer, work.max_length, packed=True)
    # Peers without padding take rows of one length alone.
    whole = [row for row in rows if len(row.input_ids) == work.max_length][:count]
    write_rows(Path(work.rows), [as_record(row) for row in whole])
    model = build(config, tokenizer)
    with quiet():
        model.save_pretrained(place)
    return sum(p.numel() for p in model.parameters())


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(prog="loralab bench pretrain", description=__doc__)
    add = step_page.arguments(parser, WAYS, PAGE, curve=False)
    add("--config", help=f"of kind pretrain, default {default.config}")
    add("--data", metavar="PATH", help=f"text, default {default.data}")
    add("--dtype", choices=["bfloat16", "float32"], help=f"default {default.dtype}")
    add("--rows", type=int, help=f"that training goes through, default {default.rows}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    return step_page.main(
        _parser(), argv, PAGE, QUICK, lambda given, say: run(Options(**given), say)
    )
