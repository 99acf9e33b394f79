"""`loralab bench sinks`: text and perplexity past the trained context, with and without sinks.

A decoder of ours reads held-out documents of three times its trained context in three ways: it
keeps every key and value; it keeps the last ones in a cache as long as the context; it keeps as
many, the first few tokens of the text among them (attention sinks, arXiv:2309.17453).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from loralab.bench import command
from loralab.bench.command import asked
from loralab.bench.table import Cell, Section, Table
from loralab.config.pretrain import SourceConfig
from loralab.errors import UserError
from loralab.gradient.corpus import read_corpus
from loralab.gradient.stream import encode
from loralab.models.decoder import DecoderForCausalLM
from loralab.models.decoder_export import from_llama
from loralab.models.load import load
from loralab.report.chart import BLUE, FAINT, GRID, ORANGE, Chart, finish, legend, title
from loralab.report.text import visible

PAGE = Path("docs/bench-sinks.md")
FIGURE = "bench-sinks.png"
BUCKETS = 4
"""Points of the curve for each trained context."""


@dataclass(frozen=True)
class Options:
    """model: a decoder's directory, or any plain Llama. text: a file or folder of it, `separator`
    between documents. context: tokens taken for the trained ones, None for the model's own.

    times: how many trained contexts are read and written. sinks: first tokens kept. documents: at
    most, those long enough.
    """

    model: str
    text: str
    separator: str | None = None
    times: int = 3
    context: int | None = None
    sinks: int = 4
    documents: int = 64
    prompt: str = "Once upon a time"
    temperature: float = 0.7
    top_k: int = 40
    seed: int = 0


@dataclass(frozen=True)
class Way:
    """How much is kept: cache_size None is everything."""

    label: str
    colour: str
    cache_size: int | None
    sinks: int


def ways(context: int, sinks: int) -> tuple[Way, ...]:
    """The three, for a model of this trained context."""
    return (
        Way("everything kept", FAINT, None, 0),
        Way(f"the last {context}", ORANGE, context, 0),
        Way(f"the first {sinks}, the last {context - sinks}", BLUE, context, sinks),
    )


@contextmanager
def keeping(model: DecoderForCausalLM, way: Way) -> Iterator[None]:
    """The model with another cache."""
    config = model.config
    before = config.cache_size, config.attention_sinks
    config.cache_size, config.attention_sinks = way.cache_size, way.sinks
    try:
        yield
    finally:
        config.cache_size, config.attention_sinks = before


@torch.no_grad()
def losses(model: DecoderForCausalLM, ids: Tensor) -> Tensor:
    """-log p of each token after the first, (documents, tokens - 1), of ids (documents, tokens)."""
    rows = []
    for row in torch.split(ids, 1):
        log_p = model(row, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        rows.append(-log_p.gather(2, row[:, 1:, None])[..., 0])
    return torch.cat(rows)


@torch.no_grad()
def written(model: DecoderForCausalLM, prompt: Tensor, tokens: int, options: Options) -> Tensor:
    """The prompt (1, n) and what the model writes after it, never an end; (tokens)."""
    torch.manual_seed(options.seed)
    out: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens - prompt.shape[1],
        do_sample=options.temperature > 0,
        temperature=options.temperature or 1.0,
        top_k=options.top_k,
        suppress_tokens=[i for i in (model.config.eos_token_id, model.config.bos_token_id) if i],
    )
    return out[0]


def documents_of(options: Options, tokenizer: Any, tokens: int) -> Tensor:
    """Ids (documents, tokens) of documents that are at least so long, with BOS.

    Raises:
        UserError: no document is.
    """
    [source] = read_corpus(
        [SourceConfig(path=options.text, separator=options.separator, test_share=0.0)]
    )
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = []
    for ids in encode([document.text for document in source.train], tokenizer):
        if len(bos) + len(ids) >= tokens:
            found.append([*bos, *ids][:tokens])
        if len(found) == options.documents:
            break
    if not found:
        raise UserError(f"{options.text}: no document has {tokens} tokens; lower --times")
    return torch.tensor(found)


def run(options: Options, loaded: tuple[Any, Any] | None = None) -> Table:
    """Measure; the table, and beside it the figure of loss over place.

    loaded: a decoder and tokenizer in place of options.model.

    Raises:
        UserError: the model is none of ours, the text too short, or a number too small.
    """
    command.check_counts(options, zero=("sinks",))
    model, tokenizer = loaded or load(options.model, dtype="float32")
    if not isinstance(model, DecoderForCausalLM):
        model = from_llama(model)
    context = options.context or model.config.max_position_embeddings
    tokens = options.times * context
    ids = documents_of(options, tokenizer, tokens)
    prompt = tokenizer(options.prompt, return_tensors="pt")["input_ids"]
    curves: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    for way in ways(context, options.sinks):
        with keeping(model, way):
            curves[way.label] = losses(model, ids)
            texts[way.label] = tokenizer.decode(written(model, prompt, tokens, options))
    facts = command.facts(
        *("loralab", "torch"),
        model=(
            f"{sum(p.numel() for p in model.parameters()):,} parameters, read in contexts of "
            f"{context} tokens"
        ),
        text=f"{len(ids)} documents of {tokens} tokens or more, cut there",
    )
    data = {
        "options": asked(options),
        "curves": {label: _buckets(curve, context) for label, curve in curves.items()},
        "texts": texts,
    }
    sections = [_perplexities(curves, context), _texts(texts, tokenizer, context)]
    chart = _chart(curves, context, options.sinks)
    return Table("Attention sinks", facts, sections, data, {FIGURE: chart.png})


def _buckets(curve: Tensor, context: int) -> list[float]:
    width = context // BUCKETS
    return [
        float(part.mean()) for part in torch.split(curve, width, 1) if part.shape[1] >= width // 2
    ]


def _perplexities(curves: Mapping[str, Tensor], context: int) -> Section:
    count = -(-next(iter(curves.values())).shape[1] // context)
    spans = [slice(i * context, (i + 1) * context) for i in range(count)]
    dense = next(iter(curves.values()))
    rows: list[list[Cell]] = []
    for label, curve in curves.items():
        each = [float(curve[:, span].mean()) for span in spans]
        # Document by document, as all ways read the same ones.
        differences = (curve[:, spans[-1]] - dense[:, spans[-1]]).mean(dim=1).tolist()
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        against = "-" if curve is dense else f"{fmean(differences):+.3f} ± {error:.3f}"
        rows.append([label, *(f"{math.exp(loss):.2f}" for loss in each), against])
    columns = ["kept", *(f"perplexity, context {i + 1}" for i in range(count)), "loss, last"]
    notes = [
        "`context n`: tokens of the n-th stretch as long as the trained context. `loss, last`: "
        "difference of the loss in the last stretch from everything kept, mean over documents ± "
        "its standard error, in nats a token.",
        f"![Loss by place in the document]({FIGURE})",
    ]
    return Section("Perplexity past the trained context", "", columns, rows, notes)


def _texts(texts: Mapping[str, str], tokenizer: Any, context: int) -> Section:
    notes = []
    for label, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        end = tokenizer.decode(ids[-context:])
        notes.append(f"**{label}**\n\n> {' '.join(visible(end, 2000).split())}")
    intro = (
        "Each way wrote a text as long as was read above, from the same prompt and seed, its end "
        "token forbidden. These are the last tokens, as many as the trained context."
    )
    return Section("Text", intro, [], [], notes)


def _chart(curves: Mapping[str, Tensor], context: int, sinks: int) -> Chart:
    colours = {way.label: way.colour for way in ways(context, sinks)}

    def draw(axes: Any) -> None:
        for label, curve in curves.items():
            points = _buckets(curve, context)
            places = [(i + 0.5) / BUCKETS for i in range(len(points))]
            axes.plot(places, points, color=colours[label], label=label, marker="o", markersize=3)
        axes.axvline(1.0, color=GRID, linewidth=1.2, linestyle="--")
        axes.set_xlabel("place in the document, in trained contexts")
        title(axes, "Loss, nats a token")
        legend(axes)

    ends = ", ".join(f"{label} {_buckets(c, context)[-1]:.2f}" for label, c in curves.items())
    return finish("sinks", f"Loss at the end: {ends}.", "Past the dashed line is untrained.", draw)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loralab bench sinks", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="`model/` of a pretraining run")
    add("--text", required=True, metavar="PATH", help="what to read; none it was trained on")
    add("--separator", metavar="TEXT", help="between documents, as <|endoftext|>")
    add("--times", type=int, help="trained contexts to read and write, default 3")
    add("--context", type=int, help="tokens of one, default the model's own")
    add("--sinks", type=int, help="first tokens kept, default 4")
    add("--documents", type=int, help="at most, default 64")
    add("--prompt", help="of the text")
    add("--seed", type=int, help="of sampling, default 0")
    add("--out", type=Path, help=f"page to write, default {PAGE}; the figure lies beside it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when measured, 2 for what the user can mend."""
    return command.main(_parser(), argv, PAGE, lambda given, _: run(Options(**given)))


if __name__ == "__main__":
    sys.exit(main())
