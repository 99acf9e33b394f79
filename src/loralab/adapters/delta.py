"""The change that training made to a model's weights, as the nearest low-rank adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loralab.adapters.state import AdapterState, Factors
from loralab.adapters.targets import linear_weights
from loralab.adapters.truncate import truncate
from loralab.errors import UserError


class LowRank(NamedTuple):
    """delta ≈ B @ A, each factor with the square roots of the singular values.

    energy: ||B A||_F^2 / ||delta||_F^2 in [0, 1], the share of the squared singular values kept; 1
    where delta is zero.
    """

    A: Tensor
    """(r, in) float32"""
    B: Tensor
    """(out, r) float32"""
    energy: float


@dataclass(frozen=True)
class TunedDelta:
    """What of a fine-tuning an adapter can hold.

    energy: kept share by module. lost: relative change ||tuned - base||_F / ||base||_F of every
    changed tensor that no LoRA of linear modules can hold (norms, embeddings, biases, the head).
    """

    adapter: AdapterState
    energy: Mapping[str, float]
    lost: Mapping[str, float]


def low_rank_delta(delta: Tensor, rank: int) -> LowRank:
    """The nearest rank-`rank` product B @ A for a change of W (out, in), by truncated SVD.

    Eckart and Young (1936): no product of that rank is nearer in the Frobenius norm. Large
    matrices take a randomised SVD, see `truncate`. A change narrower than the rank is padded with
    zeros.

    Raises:
        ValueError: delta is not finite, not a matrix, or the rank is below 1.

    Example:
        >>> import torch
        >>> low_rank_delta(torch.diag(torch.tensor([2.0, 1.0])), 1).energy
        0.8
    """
    if delta.dim() != 2 or rank < 1:
        raise ValueError(f"delta is {tuple(delta.shape)}, rank {rank}; expected (out, in), >= 1")
    made = truncate({"delta": delta}, rank, scaling=1.0)
    a, b = made.adapter.factors["delta"]
    return LowRank(a, b, _energy(made.modules["delta"]))


def tuned_delta(tuned: nn.Module, base: nn.Module, rank: int) -> TunedDelta:
    """The nearest LoRA of rank `rank`, scaling 1, for tuned - base, over every linear module.

    Modules that did not change get no factors. The two models' state dicts must have the same
    names and shapes.

    Raises:
        UserError: they do not, a change is not finite, or no linear weight changed.
    """
    before, after = base.state_dict(), tuned.state_dict()
    if different := sorted(set(before) ^ set(after)):
        raise UserError(f"{different[0]}: only one of the two models has it; wrong --base?")
    for name, tensor in before.items():
        if tensor.shape != after[name].shape:
            raise UserError(
                f"{name}: {tuple(after[name].shape)} in the fine-tuned model, "
                f"{tuple(tensor.shape)} in the base; wrong --base?"
            )
    old, new = linear_weights(base), linear_weights(tuned)
    factors: dict[str, Factors] = {}
    energy: dict[str, float] = {}
    for module, weight in old.items():
        delta = new[module].float() - weight.float()
        if not bool(torch.isfinite(delta).all()):
            raise UserError(f"{module}: the change holds NaN or infinity; the model is broken")
        if bool(delta.any()):
            made = low_rank_delta(delta, rank)
            factors[module], energy[module] = Factors(made.A, made.B), made.energy
    if not factors:
        raise UserError("no linear weight differs from the base: there is nothing to extract")
    expressed = {f"{module}.weight" for module in old}
    lost = {
        name: size
        for name, tensor in before.items()
        if name not in expressed and (size := _relative_change(after[name], tensor)) != 0
    }
    return TunedDelta(AdapterState(factors, 1.0), energy, lost)


def _relative_change(after: Tensor, before: Tensor) -> float:
    change = float((after.float() - before.float()).norm())
    size = float(before.float().norm())
    return change / size if size > 0 else change


def _energy(error: float) -> float:
    return max(0.0, 1.0 - error * error)
