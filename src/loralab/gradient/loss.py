"""The loss of a causal language model on its learned tokens alone, without the whole logits.

    loss = 1/N * sum over learned tokens t of  -log softmax(W h_t + b)[label_t]

A vocabulary of 49,152 makes the logits of one batch larger than everything else in a step, and
most of them belong to prompt tokens that nobody learns. Here the hidden states of the learned
tokens are selected first; the head runs on them in pieces, and the gradient of each piece is made
while its logits are there, as in Liger Kernel (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loralab.gradient.forward import forward_as
from loralab.gradient.known_models import MODEL_TYPES
from loralab.gradient.native.layers import kernels, takes
from loralab.gradient.native.switch import wanted
from loralab.gradient.rows import IGNORED

PIECE = 256
"""Learned tokens whose logits exist at one time."""
IN_CACHE = 8
"""Tokens whose fp32 probabilities are made at one time on a CPU: a quarter of the time of PIECE."""


def reason_against(model: Any) -> str | None:
    """Why a causal LM keeps its own loss; None where `labelled_head` computes the same."""
    kind = getattr(model.config, "model_type", "?")
    head = model.get_output_embeddings()
    if kind not in MODEL_TYPES:
        return f"model type {kind!r} is not among those known to be backbone and head alone"
    if getattr(model.config, "final_logit_softcapping", None):
        return "its logits are soft-capped"
    if type(head) is not nn.Linear:
        return f"its head is {type(head).__name__}, not a plain linear layer"
    return None


@contextmanager
def labelled_head(model: Any) -> Iterator[None]:
    """Within it, `model(..., labels=labels)` gives the same loss and no logits.

    model: the causal LM itself, not the PEFT model around it. Calls without labels are as before.
    """
    original = model.forward

    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kw: Any,
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if labels is None:
            return original(*args, **kw)
        kw["use_cache"] = False
        outputs = getattr(self, self.base_model_prefix)(*args, **kw)
        hidden = outputs.last_hidden_state
        loss = labelled_loss(hidden, labels, self.get_output_embeddings(), num_items_in_batch)
        if hasattr(self, "auxiliary_loss"):  # our decoder's, where it has experts
            mask = kw.get("attention_mask")
            extra = self.auxiliary_loss(outputs, labels, mask, num_items_in_batch)
            loss = loss if extra is None else loss + extra
        return CausalLMOutputWithPast(loss=loss)

    with forward_as(model, forward):
        yield


def labelled_loss(hidden: Tensor, labels: Tensor, head: nn.Linear, count: Any = None) -> Tensor:
    """Mean negative log-likelihood of the labels, each predicted from the token before it.

    hidden: (rows, tokens, d). labels: (rows, tokens), -100 where not learned. count: what the sum
    is divided by, None for the labels in this batch.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORED
    picked = hidden[:, :-1][learned]
    total: Tensor = _HeadLoss.apply(picked, head.weight, head.bias, targets[learned])  # type: ignore[no-untyped-call]
    return total / (learned.sum().clamp(min=1) if count is None else count)


class _HeadLoss(torch.autograd.Function):
    """Sum over tokens of -log softmax(h W^T + b)[target], float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        """hidden (n, d), weight (v, d), bias (v) or None, targets (n)."""
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for at in range(0, len(hidden), PIECE):
            h = hidden[at : at + PIECE]
            logits = functional.linear(h, weight, bias)
            slopes = needs_hidden or needs_weight or needs_bias
            losses, slope = cross_entropy(logits, targets[at : at + PIECE], slopes)
            total += losses.sum()
            if slope is None:
                continue
            if d_bias is not None:
                d_bias += slope.sum(dim=0, dtype=torch.float32)
            if d_hidden is not None:
                d_hidden[at : at + PIECE] = slope @ weight
            if d_weight is not None:
                d_weight += slope.t() @ h.to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(weight_dtype),
            None if d_bias is None else (d_bias * grad).to(bias_dtype),
            None,
        )


def cross_entropy(logits: Tensor, targets: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None]:
    """-log softmax(logits)[target], float32 (n,), and its gradient by the logits, in their type.

    logits: (n, v), overwritten. targets: (n,). slopes: whether the gradient is wanted.

    Raises:
        IndexError: a target is not in the vocabulary.
    """
    native = kernels()
    if wanted() and native is not None and takes(logits):
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
            raise IndexError(f"a label is outside the vocabulary of {logits.shape[1]}")
        losses = native.cross_entropy(logits, targets.to(torch.int64).contiguous(), slopes)
        return losses, logits if slopes else None
    step = IN_CACHE if logits.device.type == "cpu" else max(1, len(targets))
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    for at in range(0, len(targets), step):
        rows = slice(at, at + step)
        log_p = logits[rows].log_softmax(dim=-1, dtype=torch.float32)
        chosen = targets[rows, None]
        losses[rows] = -log_p.gather(1, chosen)[:, 0]
        if slopes:
            slope = log_p.exp_()
            slope.scatter_add_(1, chosen, slope.new_full((len(slope), 1), -1.0))
            logits[rows] = slope
    return losses, logits if slopes else None
