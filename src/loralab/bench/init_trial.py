"""One start, judged: at step 0, by fine-tuning on GSM8K, by evolution on conciseness and countdown.

The start is made once; each of the three trainings begins from the same copy of its factors.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import exp
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from loralab import tasks
from loralab.adapters.attach import attach, targeted_weights
from loralab.adapters.extract import parts_of, state_of
from loralab.adapters.inits import initialize
from loralab.config import (
    AdapterConfig,
    EvolveConfig,
    GenerationConfig,
    TrainingConfig,
    parse_evolve,
)
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.errors import UserError
from loralab.evolution.start import Start
from loralab.evolution.trainer import evolve
from loralab.evolution.workbench import Workbench
from loralab.gradient.ablation import mean_loss
from loralab.gradient.loop import quiet
from loralab.gradient.rows import IGNORED, Row, rows_of_task
from loralab.gradient.sft import train
from loralab.models.load import load
from loralab.rollouts import Batch, share_correct
from loralab.run import Run

GARBLED_NATS = 1.5
"""Own greedy text is called garbled when the base finds it this much less likely a token than what
the base itself writes, or when half of its 4-grams are repeats."""


@dataclass(frozen=True)
class Kind:
    """A row of the table: an initialisation with options, on a base of some kind."""

    label: str
    init: str
    options: Mapping[str, Any] = field(default_factory=dict)
    quantization: Any = None
    evolves: bool = True


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
    """What every trial shares: data, and the native engine over the plain base."""

    model_name: str
    gsm8k: str
    wikitext: Path
    budget: Budget

    @cached_property
    def base(self) -> tuple[Any, Any]:
        return load(self.model_name)

    @cached_property
    def engine(self) -> BatchedEngine:
        return BatchedEngine(*self.base)

    @cached_property
    def task(self) -> Any:
        return tasks.get("gsm8k", path=self.gsm8k)

    @cached_property
    def train_rows(self) -> Sequence[Row]:
        return rows_of_task(_first(self.task, "train", 400), "train", self.base[1], 512).rows

    @cached_property
    def test_rows(self) -> Sequence[Row]:
        first = _first(self.task, "test", self.budget.held_out)
        return rows_of_task(first, "test", self.base[1], 512).rows

    @cached_property
    def warm_rows(self) -> Sequence[Row]:
        first = _first(tasks.get("countdown"), "train", 200)
        return rows_of_task(first, "train", self.base[1], 512).rows

    @cached_property
    def texts(self) -> Sequence[str]:
        tokenizer = self.base[1]
        rows = self.train_rows[-self.budget.calibration_texts :]
        return [tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in rows]

    @cached_property
    def wiki_rows(self) -> Sequence[Row]:
        """Windows of the test text, learned whole, as rows."""
        text = self.wikitext.read_text(encoding="utf-8")
        tokenizer, size = self.base[1], self.budget.wiki_tokens
        ids = tokenizer(text[: 40 * size * self.budget.wiki_windows])["input_ids"]
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
        texts = _answers(self.engine, self.prompts)
        return _likelihood(self.base[0], self.base[1], self.prompts, texts)

    @cached_property
    def wiki_loss_of_base(self) -> float:
        return mean_loss(self.base[0], self.wiki_rows)

    @cached_property
    def probs_of_base(self) -> list[Tensor]:
        return [_log_probs(self.base[0], row) for row in self.test_rows]

    @cached_property
    def reference(self) -> Path:
        """A fine-tune to start from: a zero_b adapter trained as in a trial, with another seed."""
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


def run_trial(lab: Lab, kind: Kind, seed: int) -> dict[str, Any]:
    """Every measurement of one start with one seed."""
    budget, began = lab.budget, time.perf_counter()
    lab.engine.set_base({})  # the last search may have left its own weights in the shared base
    with quiet():
        model, tokenizer = load(lab.model_name, quantization=kind.quantization)
        peft = attach(model, lab.adapter(), seed)
        options = dict(kind.options)
        for key, value in options.items():
            if callable(value):
                options[key] = value(lab)
        cpu = time.process_time()
        report = initialize(
            peft, kind.init, seed=seed, tokenizer=tokenizer, texts=lab.texts,
            max_tokens=budget.calibration_tokens, **options,
        )  # fmt: skip
        row: dict[str, Any] = {
            "label": kind.label, "init": kind.init, "seed": seed,
            "init_cpu_seconds": time.process_time() - cpu,
            "init_figures": dict(report.figures),
            "relative_size": fmean(report.relative_size.values()),
            "changed_base": report.changed_base,
        }  # fmt: skip
        row |= _at_step_0(lab, peft, tokenizer)
        start = _Snapshot(peft)
        row |= _fine_tuned(lab, peft, tokenizer, seed, kind.quantization is not None)
        if kind.evolves:
            start.restore()
            row["conciseness"] = _evolved(lab, peft, seed, _conciseness(lab, seed))
            train(peft, tokenizer, lab.warm_rows, lab.training(budget.warm_steps), seed)
            row["countdown"] = _evolved(lab, peft, seed, _countdown(lab, seed))
    row["seconds"] = time.perf_counter() - began
    return row


def _at_step_0(lab: Lab, peft: Any, tokenizer: Any) -> dict[str, Any]:
    """KL(base || start) in nats a token, agreement, perplexity on WikiText-2, own text."""
    peft.eval()
    kl, agree, tokens = 0.0, 0, 0
    for row, base in zip(lab.test_rows, lab.probs_of_base, strict=True):
        now = _log_probs(peft, row)
        kl += float((base.exp() * (base - now)).sum())
        agree += int((base.argmax(-1) == now.argmax(-1)).sum())
        tokens += now.shape[0]
    texts = _answers(BatchedEngine(peft.get_base_model(), tokenizer, backend="torch"), lab.prompts)
    own = _likelihood(lab.base[0], tokenizer, lab.prompts, texts)
    repeated = fmean(_repetition(tokenizer(t)["input_ids"]) for t in texts)
    return {
        "kl_0": kl / tokens,
        "agreement_0": agree / tokens,
        "wiki_perplexity_0": exp(mean_loss(peft, lab.wiki_rows)),
        "own_text_nats": own,
        "own_text_nats_of_base": lab.own_text_of_base,
        "repetition_0": repeated,
        "garbled": own - lab.own_text_of_base > GARBLED_NATS or repeated > 0.5,
        "text_0": texts[0],
    }


def _fine_tuned(lab: Lab, peft: Any, tokenizer: Any, seed: int, quantized: bool) -> dict[str, Any]:
    cpu = time.process_time()
    history = train(peft, tokenizer, lab.train_rows, lab.training(), seed)
    seconds = time.process_time() - cpu
    held_out = mean_loss(peft, lab.test_rows)
    wiki = mean_loss(peft, lab.wiki_rows)
    peft.eval()
    state = None
    with contextlib.suppress(UserError):
        state = state_of(peft)
    row = _losses(history, seconds, held_out, wiki - lab.wiki_loss_of_base)
    row["effective_rank"] = None if state is None else effective_rank(state)
    if state is None or quantized:
        # The shared engine holds the plain base: neither a replaced nor a quantised one.
        engine = BatchedEngine(peft.get_base_model(), tokenizer, backend="torch")
        return row | _scored(lab, engine, None, seed)
    lab.engine.set_base({})
    lab.engine.load({"trained": state})
    return row | _scored(lab, lab.engine, "trained", seed)


def _losses(history: Any, seconds: float, held_out: float, forgot: float) -> dict[str, Any]:
    return {
        "losses": list(history.losses),
        "grad_norms": list(history.grad_norms),
        "tokens": history.tokens,
        "train_cpu_seconds": seconds,
        "held_out_loss": held_out,
        "forgetting": forgot,
    }


def _scored(lab: Lab, engine: BatchedEngine, adapter: str | None, seed: int) -> dict[str, Any]:
    """Exact match on the first GSM8K test problems, and answers in its form ("#### n")."""
    examples = tuple(lab.task.examples("test")[: lab.budget.scored])
    settings = GenerationConfig(max_new_tokens=lab.budget.answer_tokens)
    batch = Batch(lab.task, "test", examples, settings, str(seed))
    rollouts = batch.judge(engine.generate(batch.requests(adapter)))
    return {
        "gsm8k": share_correct(rollouts),
        "gsm8k_form": fmean("####" in r.text for r in rollouts),
        "text_after": rollouts[0].text,
    }


def effective_rank(state: Any) -> float:
    """exp(entropy of the normalised singular values) of B A, the mean over modules.

    Roy & Vetterli 2007; 1 for one direction, r for r equal ones.
    """
    ranks = []
    for a, b in state.factors.values():
        s = torch.linalg.svdvals(torch.linalg.qr(b.float()).R @ torch.linalg.qr(a.float().T).R.T)
        share = s / s.sum().clamp_min(1e-30)
        ranks.append(float(torch.exp(-(share * share.clamp_min(1e-30).log()).sum())))
    return fmean(ranks)


def _evolved(lab: Lab, peft: Any, seed: int, config: EvolveConfig) -> dict[str, Any] | None:
    """Evolution from the model's adapter as it is; None if it cannot be searched."""
    try:
        own, taken = parts_of(peft)
    except UserError:
        return None
    if not all(bool(f.A.any()) for f in own.factors.values()):
        return None
    weights = targeted_weights(lab.base[0], config.adapter)
    bench = Workbench(lab.engine, weights, lambda _: None, lambda *_: Start(own, taken))
    with TemporaryDirectory() as folder, Run.create(Path(folder) / "run", config.to_dict()) as run:
        cpu = time.process_time()
        result = evolve(config, run, open_workbench=lambda _: bench)
        rows = [row for row in run.metrics() if "reward_mean" in row]
    assert result.start is not None
    assert result.final is not None
    return {
        "start": result.start.reward,
        "final": result.final.reward,
        "final_correct": result.final.correct,
        "train_first": rows[0]["reward_mean"],
        "train_last": rows[-1]["reward_mean"],
        "cpu_seconds": time.process_time() - cpu,
    }


def _conciseness(lab: Lab, seed: int) -> EvolveConfig:
    b = lab.budget
    return _evolve_config(
        lab, seed, {"name": "conciseness"}, 40,
        {"generations": b.es_generations, "population": b.es_population, "optimizer": {"lr": 2.0}},
    )  # fmt: skip


def _countdown(lab: Lab, seed: int) -> EvolveConfig:
    b = lab.budget
    return _evolve_config(
        lab, seed, {"name": "countdown"}, 40,
        {
            "generations": b.countdown_generations,
            "population": b.countdown_population,
            "samples_per_generation": b.countdown_prompts,
            "test_samples": b.countdown_held_out,
            "optimizer": {"lr": 1.0},
        },
    )  # fmt: skip


def _evolve_config(
    lab: Lab, seed: int, task: Mapping[str, Any], tokens: int, evolution: Mapping[str, Any]
) -> EvolveConfig:
    values = {
        "kind": "evolve", "name": "bench", "model": lab.model_name, "device": "cpu", "seed": seed,
        "task": task,
        "adapter": {
            "rank": lab.budget.rank, "alpha": lab.budget.alpha, "init": {"name": "tiny"},
        },
        "evolution": {"eval_every": 1000, **evolution},
        "generation": {"max_new_tokens": tokens},
    }  # fmt: skip
    return parse_evolve(values, "bench inits")


class _Snapshot:
    """The factors of a PEFT model, to begin from again."""

    def __init__(self, peft: Any) -> None:
        self._kept = [
            (p, p.detach().clone()) for name, p in peft.named_parameters() if "lora_" in name
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in self._kept:
            parameter.copy_(value)


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


def _first(task: Any, split: str, count: int) -> Any:
    return _First(task, split, count)


@torch.no_grad()
def _log_probs(model: Any, row: Row) -> Tensor:
    """(T, V) log-probabilities, fp32."""
    ids = torch.tensor([row.input_ids])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _answers(engine: BatchedEngine, prompts: Sequence[Any]) -> list[str]:
    sampling = Sampling(max_new_tokens=32)
    return [c.text for c in engine.generate([Request(p, None, sampling) for p in prompts])]


def _likelihood(model: Any, tokenizer: Any, prompts: Sequence[Any], texts: Sequence[str]) -> float:
    """Nats a token that a model gives to texts behind their prompts."""
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        before = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)
        before = list(before["input_ids"])
        after = tokenizer(text or " ", add_special_tokens=False)["input_ids"]
        rows.append(Row((*before, *after), (IGNORED,) * len(before) + tuple(after)))
    return mean_loss(model, rows)


def _repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams that were there before."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
