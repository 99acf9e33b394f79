"""`loralab bench pretrain`: the cost of a step of pretraining the small decoder, beside its peers.

The decoder, Transformers' Llama of the same shape and a GPT in the manner of nanoGPT read the same
rows of stories, all weights trained; each in a process of its own, taking turns on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab import config as configs
from loralab.bench import step_page
from loralab.bench.command import told
from loralab.bench.step_page import Bench, Prepared, StepOptions
from loralab.bench.work import Work
from loralab.bench.workers import Way
from loralab.config import PretrainConfig
from loralab.errors import UserError
from loralab.gradient.collate import as_record
from loralab.gradient.corpus import read_corpus
from loralab.gradient.loop import quiet
from loralab.gradient.pretrain import build, tokenizer_of
from loralab.gradient.stream import rows_of, shuffled

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


def prepare(options: Options, folder: Path) -> Prepared:
    """The decoder, its tokenizer and whole rows of the text.

    Raises:
        UserError: a config of another kind, or text that cannot be read or is too short.
    """
    config = configs.load(options.config, [f"corpus.0.path={options.data}"])
    if not isinstance(config, PretrainConfig):
        raise UserError(f"config {options.config} is of kind {config.kind}; expected pretrain")
    training = config.training
    work = Work(
        model=f"{folder}/model",
        dtype=options.dtype,
        rows=f"{folder}/rows.json",
        steps=options.total,
        batch_size=training.batch_size,
        max_length=training.max_length,
        lr=training.lr,
    )
    [source] = read_corpus(config.corpus[:1])
    place = Path(work.model)
    tokenizer = tokenizer_of(config, place, (document.whole for document in source.train))
    documents = shuffled(source.train, config.seed)
    rows = rows_of(source, documents, tokenizer, work.max_length, packed=True)
    # Peers without padding take rows of one length alone.
    whole = [row for row in rows if len(row.input_ids) == work.max_length][: options.rows]
    work.write([as_record(row) for row in whole], told(options.data))
    model = build(config, tokenizer)
    with quiet():
        model.save_pretrained(place)
    step = (
        f"{training.batch_size} rows of {training.max_length} tokens of "
        f"{Path(options.data).name}, {options.dtype}; {config.name}, "
        f"{sum(p.numel() for p in model.parameters()):,} weights, {config.decoder.attention} "
        "attention; AdamW, clipping"
    )
    return Prepared(work, step)


def _arguments(add: Callable[..., Any], default: Options) -> None:
    add("--config", help=f"of kind pretrain, default {default.config}")
    add("--data", metavar="PATH", help=f"text, default {default.data}")
    add("--dtype", choices=["bfloat16", "float32"], help=f"default {default.dtype}")
    add("--rows", type=int, help=f"that training goes through, default {default.rows}")


BENCH = Bench(
    "pretrain",
    __doc__,
    "Pretraining benchmark",
    WAYS,
    {LLAMA: "Llama", NANO: "nanoGPT"},
    Options,
    _arguments,
    prepare,
    quick={},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    return step_page.main(BENCH, argv)
