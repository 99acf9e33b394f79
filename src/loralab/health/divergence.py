"""How far a model's expectations are from its base's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loralab.health.text import ENOUGH

if TYPE_CHECKING:
    from loralab.health.look import Look


class DivergenceProbe:
    """Along known-good texts: KL(model || base) over the full vocabulary in nats a token, share of
    tokens with the same top choice, entropy of the next token in nats, and of the texts without
    their end tokens the loss in nats a token (loss.all) and its exponential, perplexity.
    """

    name = "divergence"
    measures = "KL to the base, top-1 agreement, perplexity and entropy on known-good texts"
    cost = "one forward over prompts and texts; the base's once, and its head each time"

    def measure(self, look: Look) -> dict[str, float]:
        forced = look.good
        inside = ~forced.ends
        values = {
            "kl": _mean(forced.kl),
            "agreement": _mean(forced.agree),
            "loss.all": _mean(forced.nll[inside]),
            "perplexity": _exp(_mean(forced.nll[inside])),
            "entropy": _mean(forced.entropy),
        }
        if look.subject.has_base:
            values["base.loss.all"] = _mean(forced.base_nll[inside])
            values["base.perplexity"] = _exp(_mean(forced.base_nll[inside]))
            values["base.entropy"] = _mean(forced.base_entropy)
        return values


class OwnDivergenceProbe:
    """Along the first 32 tokens of the model's own completions: KL(model || base) in nats a token,
    and text.base_nll, the nats a token that they cost the base (answers of 8 tokens or more): what
    is garbled costs it much, another style little.

    Known-good texts keep a model on its rails; its own samples show where it goes by itself.
    """

    name = "own_divergence"
    measures = "KL to the base on the first 32 tokens of the model's own completions"
    cost = "greedy completions, and a forward of the model and one of the base over them"

    def measure(self, look: Look) -> dict[str, float]:
        if not look.subject.has_base or look.subject.only_kept:
            return {"kl.first32": math.nan, "text.base_nll": math.nan}
        own = look.own
        long = torch.isin(own.rows, torch.nonzero(torch.bincount(own.rows) >= ENOUGH)[:, 0])
        return {"kl.first32": _mean(own.kl), "text.base_nll": _mean(own.base_nll[long])}


def _mean(values: Tensor) -> float:
    """NaN of nothing."""
    return float(values.double().mean()) if len(values) else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if not value > 700 else math.inf
