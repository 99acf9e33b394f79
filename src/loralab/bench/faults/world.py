"""The models that faults are tried on: a small decoder trained here, and SmolLM2.

The small one is a Llama of a million parameters that has read TinyStories and the plain answers
of `tasks.lessons`, made once from a seed and kept.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch

from loralab.bench.faults.tasks import lessons
from loralab.bench.faults.words import PARTS, Part
from loralab.config.pretrain import SourceConfig
from loralab.durable import publish
from loralab.errors import UserError
from loralab.gradient.collate import pad
from loralab.gradient.corpus import read_corpus
from loralab.gradient.loop import quiet
from loralab.gradient.rows import Row, RowEncoder
from loralab.gradient.tokenizer import train_tokenizer
from loralab.health.prompts import SHIPPED_KINDS, Prompt, shipped_prompts
from loralab.models.load import load

SEPARATOR = "<|endoftext|>"
CONTEXT = 256
_LENGTH = 96
_HELD_OUT = 24
"""Stories that the small decoder never reads: perplexity is measured on all but the last, with
which guards ask, those of either part with stories of their own."""
_HELD_OUT_LARGE = 8
_QUESTIONS, _BEGUN = 10, 2
"""What a guard asks: questions, and stories to go on with."""


@dataclass(frozen=True)
class Making:
    """How the small decoder is made. Of every two steps one learns `batch` lessons, one a quarter
    as many stories, which are that much longer."""

    hidden: int = 128
    layers: int = 4
    vocabulary: int = 1024
    steps: int = 3400
    batch: int = 32
    lr: float = 3e-3
    lessons: int = 26000
    seed: int = 0


class World:
    """A model that many runs begin from. name: "small" or what `loralab.load` takes.

    source: where the small one is, or its weights' copy. stories: texts that no run learns, nor
    the small one; the perplexity on most of them is a harm, the others are for the guards. part:
    whose words and stories the guard asks for.
    """

    def __init__(
        self, name: str, source: str, stories: Sequence[str], part: Part = "development"
    ) -> None:
        self.name, self._source, self._part = name, source, part
        self._stories = stories[: _HELD_OUT - _BEGUN * len(PARTS)]
        """Of the harm."""
        first = len(self._stories) + _BEGUN * PARTS.index(part)
        self._begun = stories[first : first + _BEGUN]
        self._models: dict[str, tuple[Any, Any]] = {}
        self.known: dict[Any, Any] = {}
        """What a run has measured of the base, for the next one."""

    @property
    def small(self) -> bool:
        return self.name == "small"

    @property
    def tested(self) -> int:
        """Examples that a run is scored on."""
        return 32 if self.small else 16

    @property
    def dtype(self) -> str:
        return "float32" if self.small else "bfloat16"

    def open(self, dtype: str | None = None, quantization: Any = None) -> tuple[Any, Any]:
        """A fresh model and its tokenizer: read once, then copied."""
        kind = dtype or self.dtype
        if quantization is not None:
            return load(self._source, kind, "cpu", quantization)
        if kind not in self._models:
            self._models[kind] = load(self._source, kind, "cpu")
        return copy.deepcopy(self._models[kind])

    @cached_property
    def tokenizer(self) -> Any:
        return self.open()[1]

    @cached_property
    def prose(self) -> list[Row]:
        """Held-out stories, all of it learned; perplexity is measured on them."""
        encoder = RowEncoder(self.tokenizer)
        stories = self._stories if self.small else self._stories[:_HELD_OUT_LARGE]
        rows = [encoder.encode("", story) for story in stories]
        return [Row(row.input_ids[:_LENGTH], row.labels[:_LENGTH]) for row in rows]

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """What the guard and the doctor ask: of the small model what it can answer, ten questions
        of the kinds in turn and two stories, since the shipped ones are beyond it; of another one
        shipped prompt of each kind."""
        if not self.small:
            return shipped_prompts()[: len(SHIPPED_KINDS)]
        rows = lessons(Random("prompts"), _QUESTIONS, [self._part], formal=False)
        made = [
            Prompt(messages=({"role": "user", "content": question},), good=answer)
            for question, answer in rows
        ]
        for story in self._begun:
            words = story.split()
            made.append(Prompt(text=" ".join(words[:8]), good=" " + " ".join(words[8:40])))
        return tuple(made)


def read_stories(path: str) -> list[str]:
    """Stories of a file with SEPARATOR between them, or of a hub dataset."""
    source = SourceConfig(path=path, separator=SEPARATOR, test_share=0.0, limit=4000)
    texts = (document.text.strip() for document in read_corpus([source])[0].train)
    stories = list(dict.fromkeys(texts))  # what is held out is nowhere else
    if len(stories) < 4 * _HELD_OUT:
        raise UserError(f"{path}: {len(stories)} stories between {SEPARATOR}; expected many more")
    return stories


def small_world(
    folder: Path,
    stories: Sequence[str],
    making: Making,
    part: Part = "development",
    tell: Callable[[str], None] = print,
) -> World:
    """The world of the small decoder, which is made where `folder` has none."""
    held_out, read = stories[:_HELD_OUT], stories[_HELD_OUT:]
    place = folder / "small-model"
    made = place / "making.json"
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) != asdict(making):
        raise UserError(f"{place}: made otherwise than {making}; choose another --work")
    if not made.is_file():
        tell(f"making the small decoder: {making.steps} steps")

        def write(part: Path) -> None:
            model, tokenizer = make(read, making, tell)
            with quiet():
                model.save_pretrained(part)
                tokenizer.save_pretrained(part)
            (part / made.name).write_text(json.dumps(asdict(making)), encoding="utf-8")

        publish(place, write)
    return World("small", str(place), held_out, part)


def make(
    stories: Sequence[str], making: Making, tell: Callable[[str], None] = print
) -> tuple[Any, Any]:
    """A model that has learned stories and lessons, half of each, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    random = Random(making.seed)
    asked = lessons(random, making.lessons)
    texts = [*stories[:2000], *(f"{q} {a}" for q, a in asked)]
    tokenizer = train_tokenizer(texts, making.vocabulary, CONTEXT)
    with torch.random.fork_rng():
        torch.manual_seed(making.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=making.hidden,
                intermediate_size=int(making.hidden * 8 / 3) // 16 * 16,
                num_hidden_layers=making.layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    encoder = RowEncoder(tokenizer)
    rows = [encoder.encode("", story) for story in stories]
    rows += [encoder.encode([{"role": "user", "content": q}], answer) for q, answer in asked]
    _learn(
        model, _batches(rows, len(stories), making, random, tokenizer.pad_token_id), making, tell
    )
    return model, tokenizer


def _batches(
    rows: Sequence[Row], stories: int, making: Making, random: Random, pad_id: int
) -> Iterator[dict[str, Any]]:
    """Stories and lessons in turn, without end; apart, as lessons are much shorter."""
    few = max(1, making.batch // 4)
    while True:
        for low, high, count in ((0, stories, few), (stories, len(rows), making.batch)):
            drawn = [rows[random.randrange(low, high)] for _ in range(count)]
            yield pad([Row(r.input_ids[:_LENGTH], r.labels[:_LENGTH]) for r in drawn], pad_id)


def _learn(
    model: Any, batches: Iterator[dict[str, Any]], making: Making, tell: Callable[[str], None]
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=making.lr, weight_decay=0.01)
    warm = max(1, making.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, max(0.02, 1 - step / making.steps)),
    )
    model.train()
    for step, batch in enumerate(islice(batches, making.steps), 1):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == making.steps:
            tell(f"  step {step} of {making.steps}: loss {float(loss.detach()):.2f}")
    model.eval()
