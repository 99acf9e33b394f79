"""How well a model predicts a text: perplexity over a window that slides.

Every token but the first is predicted once, from at least `context - stride` tokens before it where
there are as many: https://huggingface.co/docs/transformers/perplexity
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from loralab.adapters.state import AdapterState
from loralab.engines.base import Progress
from loralab.engines.lora_linear import Routing, build_stacks, patched
from loralab.errors import UserError


@dataclass(frozen=True)
class Likelihood:
    """nats: the negative log-likelihood of `tokens` tokens, which are `words` words (split at
    spaces) and `bytes` bytes of UTF-8.

    error: standard error of nats a token, the windows taken as independent; None of one window.
    """

    nats: float
    tokens: int
    words: int
    bytes: int
    error: float | None = None

    @property
    def perplexity(self) -> float:
        """exp of nats a token: compares models of one tokenizer only."""
        return _exp(self.nats / self.tokens)

    @property
    def perplexity_error(self) -> float | None:
        """Standard error of the perplexity, to first order."""
        return None if self.error is None else self.perplexity * self.error

    @property
    def word_perplexity(self) -> float:
        """exp of nats a word: compares models of any tokenizer on one text."""
        return _exp(self.nats / self.words)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "perplexity": self.perplexity,
            "perplexity_error": self.perplexity_error,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
        }


@torch.inference_mode()
def likelihood(
    model: Any,
    tokenizer: Any,
    text: str,
    adapter: AdapterState | None = None,
    *,
    context: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Likelihood:
    """Perplexity of a causal model on a text.

    context: tokens in a window, at most what the model allows. stride: new ones in each; None is
    half of the context. max_tokens: of the text, from its beginning.

    Raises:
        UserError: fewer than two tokens, or an adapter that does not fit.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    first = tokenizer("", add_special_tokens=True)["input_ids"]
    if bos is not None and bos in first and ids[:1] != [bos]:
        ids = [bos, *ids]
    ids = ids[:max_tokens] if max_tokens is not None else ids
    if len(ids) < 2:
        raise UserError(f"perplexity needs two tokens or more, the text has {len(ids)}")
    limit = getattr(model.config, "max_position_embeddings", None) or context
    context = min(context, int(limit))
    stride = min(stride or max(1, context // 2), context - 1)
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor(ids, device=device)
    targets = {} if adapter is None else build_stacks(model, [adapter])
    routing = None if adapter is None else Routing.of([0], device)
    windows: list[tuple[float, int]] = []
    done = 1
    was_training = model.training
    model.eval()
    try:
        while done < len(ids):
            end = min(len(ids), max(done + stride, context))
            window = tokens[max(0, end - context) : end]
            with patched(targets, routing):
                logits = model(input_ids=window[None], use_cache=False).logits[0]
            new = end - done
            wanted = logits[-new - 1 : -1].float()
            windows.append((float(cross_entropy(wanted, window[-new:], reduction="sum")), new))
            done = end
            if progress is not None:
                progress(done, len(ids))
    finally:
        model.train(was_training)
    # What the text is in words and bytes, of those tokens that were predicted.
    told = tokenizer.decode(ids[1:], skip_special_tokens=True)
    words, size = max(1, len(told.split())), max(1, len(told.encode()))
    total = sum(nats for nats, _ in windows)
    return Likelihood(total, len(ids) - 1, words, size, _error(windows))


def _error(windows: Sequence[tuple[float, int]]) -> float | None:
    """Of nats a token: of a ratio of two sums, over windows (nats, tokens) of unequal length."""
    if len(windows) < 2:
        return None
    tokens = sum(count for _, count in windows)
    rate = sum(nats for nats, _ in windows) / tokens
    squares = sum((nats - rate * count) ** 2 for nats, count in windows)
    return math.sqrt(squares * len(windows) / (len(windows) - 1)) / tokens


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
