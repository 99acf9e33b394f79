"""One start, judged: at step 0, by fine-tuning on GSM8K, by evolution on conciseness and countdown.

The start is made once; each of the three trainings begins from the same copy of its factors.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from math import exp
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loralab.adapters.attach import attach, targeted_weights
from loralab.adapters.extract import parts_of, state_of
from loralab.adapters.inits import InitReport, initialize
from loralab.bench.init_lab import Kind, Lab
from loralab.bench.init_measures import answers, effective_rank, likelihood, log_probs, repetition
from loralab.config import EvolveConfig, GenerationConfig, parse_evolve
from loralab.engines.batched import BatchedEngine
from loralab.errors import UserError
from loralab.evolution.start import Start
from loralab.evolution.trainer import evolve
from loralab.evolution.workbench import Workbench
from loralab.gradient.ablation import mean_loss
from loralab.gradient.loop import quiet
from loralab.gradient.sft import train
from loralab.models.load import load
from loralab.rollouts import Batch, share_correct
from loralab.run import Run

GARBLED_NATS = 1.5
"""Own greedy text is called garbled when the base finds it this much less likely a token than what
the base itself writes, or when half of its 4-grams are repeats."""


def started(lab: Lab, kind: Kind, seed: int) -> tuple[Any, Any, InitReport, float]:
    """A PEFT model that has been started, its tokenizer, and processor seconds of the start."""
    model, tokenizer = load(lab.model_name, quantization=kind.quantization)
    peft = attach(model, lab.adapter(), seed)
    options = {k: value(lab) if callable(value) else value for k, value in kind.options.items()}
    texts, cpu = lab.texts, time.process_time()
    report = initialize(
        peft, kind.init, seed=seed, tokenizer=tokenizer, texts=texts,
        max_tokens=lab.budget.calibration_tokens, **options,
    )  # fmt: skip
    return peft, tokenizer, report, time.process_time() - cpu


def run_trial(lab: Lab, kind: Kind, seed: int) -> dict[str, Any]:
    """Every measurement of one start with one seed."""
    began = time.perf_counter()
    lab.engine.set_base({})  # the last search may have left its own weights in the shared base
    with quiet():
        peft, tokenizer, report, cpu = started(lab, kind, seed)
        row: dict[str, Any] = {
            "label": kind.label, "init": kind.init, "seed": seed,
            "init_cpu_seconds": cpu,
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
            train(peft, tokenizer, lab.warm_rows, lab.training(lab.budget.warm_steps), seed)
            row["countdown"] = _evolved(lab, peft, seed, _countdown(lab, seed))
    row["seconds"] = time.perf_counter() - began
    return row


def _at_step_0(lab: Lab, peft: Any, tokenizer: Any) -> dict[str, Any]:
    """KL(base || start) in nats a token, agreement, perplexity on WikiText-2, own text."""
    peft.eval()
    kl, agree, tokens = 0.0, 0, 0
    for row, base in zip(lab.test_rows, lab.probs_of_base, strict=True):
        now = log_probs(peft, row)
        kl += float((base.exp() * (base - now)).sum())
        agree += int((base.argmax(-1) == now.argmax(-1)).sum())
        tokens += now.shape[0]
    texts = answers(BatchedEngine(peft.get_base_model(), tokenizer, backend="torch"), lab.prompts)
    own = likelihood(lab.base[0], tokenizer, lab.prompts, texts)
    repeated = fmean(repetition(tokenizer(t)["input_ids"]) for t in texts)
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
        "guard": None,
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
