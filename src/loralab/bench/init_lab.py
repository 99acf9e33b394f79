"""The starts that are compared, and what their trials share: rows, texts, references, an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from loralab import tasks
from loralab.adapters.attach import attach
from loralab.adapters.extract import state_of
from loralab.adapters.inits import initialize
from loralab.bench.init_measures import answers, likelihood, log_probs
from loralab.config import AdapterConfig, TrainingConfig
from loralab.engines.batched import BatchedEngine
from loralab.gradient.ablation import mean_loss
from loralab.gradient.loop import quiet
from loralab.gradient.rows import IGNORED, Row, rows_of_task
from loralab.gradient.sft import train
from loralab.models.load import load, locate
from loralab.tasks.base import Split


@dataclass(frozen=True)
class Kind:
    """A row of the table: an initialisation with options, on a base of some kind."""

    label: str
    init: str
    options: Mapping[str, Any] = field(default_factory=dict)
    quantization: Any = None
    evolves: bool = True


KINDS = (
    Kind("zero_b", "zero_b"),
    Kind("gaussian (PEFT)", "gaussian"),
    Kind("tiny", "tiny"),
    Kind("random", "random"),
    Kind("orthogonal", "orthogonal"),
    Kind("orthogonal_negative", "orthogonal_negative"),
    Kind("output_match", "output_match"),
    Kind("output_match, gradient", "output_match", {"method": "gradient"}),
    Kind("svd_delta", "svd_delta", {"reference": lambda lab: lab.merged_reference}),
    Kind("warm_start", "warm_start", {"path": lambda lab: str(lab.reference)}),
    Kind("progressive", "progressive", {"steps": 6}, evolves=False),
    Kind("pissa", "pissa"),
    Kind("olora", "olora"),
    Kind("eva", "eva"),
    Kind("corda", "corda"),
    Kind("lora_ga", "lora_ga"),
    Kind("mica", "mica", evolves=False),
    Kind("loftq (base becomes nf4)", "loftq", evolves=False),
    Kind("nf4 base: zero_b", "zero_b", quantization="nf4", evolves=False),
    Kind(
        "nf4 base: loftq", "loftq", {"reference": lambda lab: lab.full_precision}, "nf4", False
    ),
    Kind(
        "nf4 base: quantization_match",
        "quantization_match",
        {"reference": lambda lab: lab.full_precision},
        "nf4",
        False,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """How much each trial does. The defaults take a minute or so of one CPU core."""

    rank: int = 8
    alpha: float = 16.0
    calibration_texts: int = 8
    calibration_tokens: int = 128
    sft_steps: int = 12
    sft_batch: int = 3
    lr: float = 2e-4
    held_out: int = 8
    scored: int = 8
    answer_tokens: int = 96
    wiki_windows: int = 4
    wiki_tokens: int = 192
    es_generations: int = 5
    es_population: int = 12
    warm_steps: int = 5
    countdown_generations: int = 2
    countdown_population: int = 8
    countdown_prompts: int = 3
    countdown_held_out: int = 8


@dataclass
class Lab:
    """What every trial shares: data, and the native engine over the plain base.

    trained: an adapter's directory, in the place of the `reference` that would be trained.
    """

    model_name: str
    gsm8k: str
    wikitext: Path
    budget: Budget
    trained: Path | None = None

    @cached_property
    def setting(self) -> dict[str, Any]:
        """What the trials of one table have in common: the model, digests of the data (None where
        there is no such file), the budget."""
        splits: tuple[Split, ...] = ("train", "test")
        rows = [[dict(e.data) for e in self.task.examples(split)] for split in splits]
        there = self.wikitext.is_file()
        return {
            "model": self.model_name,
            "gsm8k": _digest(json.dumps(rows, default=str).encode()),
            "wikitext": _digest(self.wikitext.read_bytes()) if there else None,
            "budget": asdict(self.budget),
        }

    @cached_property
    def base(self) -> tuple[Any, Any]:
        return load(self.model_name)

    @cached_property
    def tokenizer(self) -> Any:
        """The base's, without its weights."""
        return AutoTokenizer.from_pretrained(locate(self.model_name, torch.bfloat16))

    @cached_property
    def engine(self) -> BatchedEngine:
        return BatchedEngine(*self.base)

    @cached_property
    def task(self) -> Any:
        return tasks.get("gsm8k", path=self.gsm8k)

    @cached_property
    def train_rows(self) -> Sequence[Row]:
        return rows_of_task(_First(self.task, "train", 400), "train", self.tokenizer, 512).rows

    @cached_property
    def test_rows(self) -> Sequence[Row]:
        first = _First(self.task, "test", self.budget.held_out)
        return rows_of_task(first, "test", self.tokenizer, 512).rows

    @cached_property
    def warm_rows(self) -> Sequence[Row]:
        first = _First(tasks.get("countdown"), "train", 200)
        return rows_of_task(first, "train", self.tokenizer, 512).rows

    @cached_property
    def texts(self) -> Sequence[str]:
        rows = self.train_rows[-self.budget.calibration_texts :]
        return [self.tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in rows]

    @cached_property
    def wiki_rows(self) -> Sequence[Row]:
        """Windows of the test text, learned whole, as rows."""
        text = self.wikitext.read_text(encoding="utf-8")
        size = self.budget.wiki_tokens
        ids = self.tokenizer(text[: 40 * size * self.budget.wiki_windows])["input_ids"]
        starts = range(0, size * self.budget.wiki_windows, size)
        return [Row(tuple(w), (IGNORED, *w[1:])) for at in starts if (w := ids[at : at + size])]

    @cached_property
    def prompts(self) -> Sequence[Any]:
        concise, sums = tasks.get("conciseness"), self.task
        return [
            *(concise.prompt(e) for e in concise.examples("test")[:2]),
            *(sums.prompt(e) for e in sums.examples("test")[:2]),
        ]

    @cached_property
    def own_text_of_base(self) -> float:
        """Nats a token that the base gives to what it writes itself."""
        texts = answers(self.engine, self.prompts)
        return likelihood(self.base[0], self.base[1], self.prompts, texts)

    @cached_property
    def wiki_loss_of_base(self) -> float:
        return mean_loss(self.base[0], self.wiki_rows)

    @cached_property
    def probs_of_base(self) -> list[Tensor]:
        return [log_probs(self.base[0], row) for row in self.test_rows]

    @cached_property
    def reference(self) -> Path:
        """A fine-tune to start from: a zero_b adapter trained as in a trial, with another seed."""
        if self.trained is not None:
            return self.trained
        folder = Path(self._folder.name) / "reference"
        with quiet():
            model, tokenizer = load(self.model_name)
            peft = attach(model, self.adapter(), seed=1234)
            initialize(peft, "zero_b", seed=1234)
            half = len(self.train_rows) // 2
            train(peft, tokenizer, self.train_rows[half : half + 100], self.training(), 1234)
        state_of(peft).save(folder)
        return folder

    @cached_property
    def merged_reference(self) -> Any:
        """The same fine-tune with its change merged into the weights, fp32."""
        from peft import PeftModel

        model, _ = load(self.model_name, "float32")
        return PeftModel.from_pretrained(model, str(self.reference)).merge_and_unload()

    @cached_property
    def full_precision(self) -> Any:
        return load(self.model_name, "float32")[0]

    @cached_property
    def _folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory()

    def adapter(self) -> AdapterConfig:
        return AdapterConfig(rank=self.budget.rank, alpha=self.budget.alpha)

    def training(self, steps: int | None = None) -> TrainingConfig:
        budget = self.budget
        return TrainingConfig(
            steps=steps or budget.sft_steps, batch_size=budget.sft_batch, lr=budget.lr, warmup=2,
            max_length=512,
        )  # fmt: skip


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()


@dataclass(frozen=True)
class _First:
    """A task cut to its first examples."""

    task: Any
    split: str
    count: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def examples(self, split: str) -> Any:
        return self.task.examples(split)[: self.count]
