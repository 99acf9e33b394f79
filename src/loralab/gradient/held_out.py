"""How a language model in training is tried: loss on held-out rows, texts for fixed prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from loralab.config import GenerationConfig
from loralab.engines.attention import attention_configs
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.gradient import attention, loss
from loralab.gradient.collate import flatten, pad
from loralab.gradient.forward import causal_of
from loralab.gradient.layers import fused_layers
from loralab.gradient.rows import Row
from loralab.rollouts import stable_hash


@contextmanager
def own_step(model: Any, fast: bool) -> Iterator[bool]:
    """Within it a causal LM takes flat batches (`collate.flatten`) and gives the loss alone.

    Gives whether it does: False where `fast` is not wanted or the model does not allow it.
    """
    flat = fast and loss.reason_against(model) is None and attention.reason_against(model) is None
    with ExitStack() as stack:
        if flat:
            stack.enter_context(loss.labelled_head(model))
            stack.enter_context(attention.named_attention(model, attention.NAME))
            stack.enter_context(fused_layers(model))
        yield flat


@torch.no_grad()
def mean_loss(
    model: Any, rows: Sequence[Row], batch_size: int = 1, autocast: bool = False
) -> float | None:
    """Mean negative log-likelihood of a learned token in nats; None without rows.

    model: a causal LM, or PEFT's around it. autocast: products in bf16, as they are in training.
    """
    if not rows:
        return None
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    total, count = 0.0, 0
    with (
        own_step(causal_of(model), fast=True) as flat,
        torch.autocast(device.type, torch.bfloat16, autocast),
    ):
        for at in range(0, len(rows), batch_size):
            some = rows[at : at + batch_size]
            batch = flatten(some) if flat else pad(some, 0)
            batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
            learned = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * learned
            count += learned
    model.train(was_training)
    return total / max(count, 1)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], settings: GenerationConfig, seed: int
) -> list[str]:
    """A text for each prompt; a prompt's own seed is the same at every call."""
    requests = [
        Request(
            prompt,
            None,
            Sampling(
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                seed=stable_hash(seed, "sample", prompt) >> 1,
                stop=settings.stop,
            ),
        )
        for prompt in prompts
    ]
    names = {config._attn_implementation_internal for config in attention_configs(model)}
    own = "sdpa" if attention.NAME in names else None
    with attention.named_attention(model, own):
        return [c.text for c in BatchedEngine(model, tokenizer, "torch").generate(requests)]
