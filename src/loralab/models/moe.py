"""A mixture of SwiGLU experts: each token goes through the k that its router likes best.

    p = softmax(W_r x);  y = sum over the top k of  p_e / (sum of those p) * expert_e(x)

as in Mixtral (arXiv:2401.04088); the loss that keeps experts evenly used is the Switch
Transformer's (arXiv:2101.03961, equations 4 to 6).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from loralab.models.decoder_config import DecoderConfig


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x), arXiv:2002.05202."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        wide, narrow = config.intermediate_size, config.hidden_size
        self.gate_proj = nn.Linear(narrow, wide, bias=False)
        self.up_proj = nn.Linear(narrow, wide, bias=False)
        self.down_proj = nn.Linear(wide, narrow, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) to (..., hidden)."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.Module):
    """Router `gate` and the experts; PEFT reaches the linears in each of them by name."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (rows, tokens, hidden) to its like, and router logits (rows * tokens, experts)."""
        tokens = x.reshape(-1, x.shape[-1])
        logits: Tensor = self.gate(tokens)
        shares, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(self.chosen, dim=-1)
        shares = (shares / shares.sum(dim=-1, keepdim=True)).to(tokens.dtype)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            # An expert without tokens still takes part, so that its gradient is zero, not absent.
            out = out.index_add(0, token, expert(tokens[token]) * shares[token, place, None])
        return out.view_as(x), logits


def load_balance(logits: Sequence[Tensor], chosen: int, mask: Tensor | None = None) -> Tensor:
    """experts * sum_e f_e P_e, over the tokens of all layers; k where every expert is used evenly.

    f_e: how often expert e is among the k chosen, per token. P_e: mean router probability.

    logits: (tokens, experts) of each layer. mask: (rows, tokens of a row), 0 on padding.
    """
    stacked = torch.cat([layer.float() for layer in logits])
    experts = stacked.shape[1]
    probabilities = stacked.softmax(dim=-1)
    used = functional.one_hot(probabilities.topk(chosen, dim=-1).indices, experts).sum(dim=1)
    weight = torch.ones(len(stacked), device=stacked.device)
    if mask is not None:
        weight = mask.reshape(-1).to(weight).repeat(len(logits))
    total = weight.sum()
    often = weight @ used.to(weight.dtype) / total
    likely = weight @ probabilities / total
    return experts * (often * likely).sum()
