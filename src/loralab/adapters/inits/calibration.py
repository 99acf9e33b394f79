"""Second moments of what goes into each linear module, on given text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Moments:
    """E[x x^T] (in, in), fp32, by module. Modules fed by one tensor (q, k, v) share theirs."""

    leader: Mapping[str, str]
    sums: Mapping[str, Tensor]
    tokens: int
    _eigen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, name: str) -> Tensor:
        """E[x x^T] of a module's input, (in, in)."""
        return self.sums[self.leader[name]] / self.tokens

    def eigen(self, name: str) -> tuple[Tensor, Tensor]:
        """Eigenvalues (in,), ascending and not negative, and eigenvectors (in, in) in columns."""
        leader = self.leader[name]
        if leader not in self._eigen:
            values, vectors = torch.linalg.eigh(self.of(name))
            self._eigen[leader] = (values.clamp_min(0), vectors)
        return self._eigen[leader]

    def size(self, name: str, matrix: Tensor) -> float:
        """sqrt(E ||M x||^2) for a matrix M (out, in): the size of its typical output."""
        dense = matrix.float()
        return float((dense @ self.of(name) * dense).sum().clamp_min(0).sqrt())


@torch.no_grad()
def measure(model: nn.Module, modules: Mapping[str, nn.Module], rows: Sequence[Tensor]) -> Moments:
    """Run the rows (1, T) through the model and sum x x^T before each module."""
    leader: dict[str, str] = {}
    sums: dict[str, Tensor] = {}
    last: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]
            # Only the tensor seen just before can be the same one: older ones may be freed and
            # their memory used again.
            if last and last[0][0] is x:
                leader.setdefault(name, last[0][1])
            else:
                leader.setdefault(name, name)
                last[:] = [(x, leader[name])]
            if leader[name] == name:
                flat = x.detach().reshape(-1, x.shape[-1]).float()
                product = flat.T @ flat
                sums[name] = sums[name].add_(product) if name in sums else product

        return see

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in modules.items()]
    was_training = model.training
    model.eval()
    try:
        for row in rows:
            model(input_ids=row, use_cache=False)
            last.clear()
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return Moments(leader, sums, sum(row.shape[1] for row in rows))
