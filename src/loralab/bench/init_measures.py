"""What a start and a trained adapter are measured by, besides losses."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.gradient.ablation import mean_loss
from loralab.gradient.rows import IGNORED, Row


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


@torch.no_grad()
def log_probs(model: Any, row: Row) -> Tensor:
    """(T, V) log-probabilities, fp32."""
    ids = torch.tensor([row.input_ids])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def answers(engine: BatchedEngine, prompts: Sequence[Any]) -> list[str]:
    sampling = Sampling(max_new_tokens=32)
    return [c.text for c in engine.generate([Request(p, None, sampling) for p in prompts])]


def likelihood(model: Any, tokenizer: Any, prompts: Sequence[Any], texts: Sequence[str]) -> float:
    """Nats a token that a model gives to texts behind their prompts."""
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        before = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)
        before = list(before["input_ids"])
        after = tokenizer(text or " ", add_special_tokens=False)["input_ids"]
        rows.append(Row((*before, *after), (IGNORED,) * len(before) + tuple(after)))
    return mean_loss(model, rows)


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams that were there before."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
