"""Log-probabilities of the labelled tokens alone, with gradients, without the whole logits.

    log p_t = log softmax((W h_t + b) / T)[label_t]

Preference losses and policy gradients weigh each token by a number that is known only when all
log-probabilities are. Since the gradient of log p_t by h_t does not depend on that weight, it is
made in pieces on the way forward, as in `loss.py`, and scaled by the weight on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loralab.gradient.forward import forward_as
from loralab.gradient.loss import PIECE, cross_entropy, reason_against
from loralab.gradient.rows import IGNORED

LOG_PROBS = "log_probs"


@contextmanager
def labelled_log_probs(model: Any, temperature: float = 1.0, whole: bool = False) -> Iterator[None]:
    """Within it, `model(..., labels=labels)` gives {"log_probs": (n,) float32}.

    n: the labelled tokens, row by row; each is predicted from the token before it, and a row's
    first token never is. model: the causal LM itself, not the PEFT model around it. whole: make
    the whole logits, as is done for a model that is not known to be backbone and head. Calls
    without labels are as before.
    """
    original = model.forward
    plain_head = not whole and reason_against(model) is None

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kw: Any) -> Any:
        if labels is None:
            return original(*args, **kw)
        targets = labels[:, 1:]
        learned = targets != IGNORED
        kw["use_cache"] = False
        if plain_head:
            hidden = getattr(self, self.base_model_prefix)(*args, **kw).last_hidden_state
            head = self.get_output_embeddings()
            picked = hidden[:, :-1][learned]
            return {LOG_PROBS: token_log_probs(picked, targets[learned], head, temperature)}
        logits = original(*args, **kw).logits[:, :-1][learned].float() / temperature
        return {LOG_PROBS: -functional.cross_entropy(logits, targets[learned], reduction="none")}

    with forward_as(model, forward):
        yield


def token_log_probs(
    hidden: Tensor, targets: Tensor, head: nn.Linear, temperature: float = 1.0
) -> Tensor:
    """Log-probability (n,) float32 of each target.

    hidden: (n, d), of the tokens before. targets: (n,). head: d -> vocabulary.
    """
    made: Tensor = _HeadLogProbs.apply(hidden, head.weight, head.bias, targets, temperature)  # type: ignore[no-untyped-call]
    return made


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
    ) -> Tensor:
        """hidden (n, d), weight (v, d), bias (v) or None, targets (n)."""
        needs_hidden, *needs_head = ctx.needs_input_grad[:3]
        slopes = torch.zeros_like(hidden) if needs_hidden else None
        found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for at in range(0, len(hidden), PIECE):
            piece = slice(at, at + PIECE)
            logits = _logits(hidden[piece], weight, bias, temperature)
            losses, slope = cross_entropy(logits, targets[piece], slopes is not None)
            found[piece] = -losses
            if slopes is not None and slope is not None:
                # Of log p, not of the loss -log p, and by the logits before the temperature.
                slopes[piece] = (slope.to(weight.dtype) @ weight).mul_(-1 / temperature)
        kept = (hidden, weight, bias) if any(needs_head) else (None, None, None)
        ctx.save_for_backward(slopes, targets, *kept)
        ctx.temperature = temperature
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad (n,): what each token's log-probability weighs."""
        slopes, targets, hidden, weight, bias = ctx.saved_tensors
        of_hidden = None if slopes is None else (slopes * grad[:, None]).to(slopes.dtype)
        if weight is None:
            return of_hidden, None, None, None, None
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for at in range(0, len(hidden), PIECE):
            piece = slice(at, at + PIECE)
            logits = _logits(hidden[piece], weight, bias, ctx.temperature)
            _, toward = cross_entropy(logits, targets[piece], True)
            assert toward is not None
            slope = toward.float() * (-grad[piece, None] / ctx.temperature)
            if of_bias is not None:
                of_bias += slope.sum(dim=0)
            of_weight += slope.to(weight.dtype).t() @ hidden[piece].to(weight.dtype)
        cast_bias = None if of_bias is None else of_bias.to(bias.dtype)
        return of_hidden, of_weight.to(weight.dtype), cast_bias, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = functional.linear(hidden.to(weight.dtype), weight, bias)
    return logits if temperature == 1.0 else logits.float() / temperature
