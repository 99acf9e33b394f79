"""Linear layers that add a different adapter to each row of the batch.

The base product x W^T is one for all rows. The adapters' products are batched over members:
rows are laid out as (members, width, in), where width is the most rows any member has. Members
that share the same `A` tensor (evolution on `B`) share its product too.

In bf16 the adapter's term is computed first and the base product is accumulated onto it, so that
the sum is rounded once: rounding x W^T first would lose every delta under half an ulp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.state import AdapterState, Factors
from loralab.errors import UserError


@dataclass(frozen=True)
class LoraStack:
    """One module's factors for all members, ready for batched products.

    down: (members, in, rank), or (in, rank) when every member shares one `A`.
    up: (members, rank, out). scaling: (members, 1, 1), or None where `up` holds it already.
    """

    down: Tensor
    up: Tensor
    scaling: Tensor | None

    @property
    def shared(self) -> bool:
        """Whether all members have the same `A`."""
        return self.down.dim() == 2


def stack(
    factors: Sequence[Factors | None], scalings: Sequence[float], weight: Tensor
) -> LoraStack:
    """Stack one module's factors over members (None: this member leaves the module alone).

    Factors are cast to the weight's dtype and device. Different ranks are padded with zeros.
    """
    present = [f for f in factors if f is not None]
    rank = max(f.A.shape[0] for f in present)
    features, outputs = present[0].A.shape[1], present[0].B.shape[0]
    dtype, device = weight.dtype, weight.device
    up = torch.zeros(len(factors), rank, outputs, dtype=dtype, device=device)
    for member, pair in enumerate(factors):
        if pair is not None:
            up[member, : pair.B.shape[1]] = pair.B.detach().t()
    if len({id(f.A) for f in present}) == 1:
        down = present[0].A.detach().to(dtype=dtype, device=device).t()
    else:
        # Held as (members, rank, in): dot products then run along contiguous memory.
        rows = torch.zeros(len(factors), rank, features, dtype=dtype, device=device)
        for member, pair in enumerate(factors):
            if pair is not None:
                rows[member, : pair.A.shape[0]] = pair.A.detach()
        down = rows.transpose(1, 2)
    factor = torch.tensor(scalings, dtype=dtype, device=device)[:, None, None]
    if all(math.frexp(scaling)[0] in (0.0, 0.5, -0.5) for scaling in scalings):
        # Powers of two scale a float exactly, so these need no product of their own each step.
        return LoraStack(down, up.mul_(factor), None)
    return LoraStack(down, up, factor)


@dataclass(frozen=True)
class Routing:
    """Which member each row of a batch belongs to, laid out for batched products.

    members: the stack's slice that takes part, or the members themselves where most of the slice
    would be idle. count x width slots hold the rows: slot_rows says which row feeds a slot, and
    row_slots where a row's result is (both None when rows are the slots in order). bare: rows
    without an adapter.
    """

    rows: int
    members: slice | Tensor
    count: int
    width: int
    slot_rows: Tensor | None
    row_slots: Tensor | None
    bare: Tensor | None
    _selected: dict[int, LoraStack] = field(default_factory=dict)

    @staticmethod
    def of(members: Sequence[int], device: torch.device) -> Routing | None:
        """Routing for rows of these members (-1: no adapter); None if no row has one."""
        by_member: dict[int, list[int]] = {}
        for row, member in enumerate(members):
            if member >= 0:
                by_member.setdefault(member, []).append(row)
        if not by_member:
            return None
        alive = sorted(by_member)
        span = range(alive[0], alive[-1] + 1)
        picked: slice | Tensor
        if 2 * len(alive) > len(span):
            picked, order = slice(span.start, span.stop), list(span)
        else:
            picked, order = torch.tensor(alive, device=device), alive
        width = max(len(rows) for rows in by_member.values())
        slot_rows: list[int] = []
        row_slots = [0] * len(members)
        for place, member in enumerate(order):
            rows = by_member.get(member, [])
            for offset, row in enumerate(rows):
                row_slots[row] = place * width + offset
            slot_rows += rows + [0] * (width - len(rows))
        bare = [row for row, member in enumerate(members) if member < 0]
        in_order = row_slots == list(range(len(slot_rows))) and not bare
        return Routing(
            len(members),
            picked,
            len(order),
            width,
            None if in_order else torch.tensor(slot_rows, device=device),
            None if in_order else torch.tensor(row_slots, device=device),
            torch.tensor(bare, device=device) if bare else None,
        )

    def select(self, stacked: LoraStack) -> LoraStack:
        """The part of a stack that this routing's slots use."""
        if isinstance(self.members, Tensor):
            if id(stacked) not in self._selected:
                self._selected[id(stacked)] = _sliced(stacked, self.members)
            return self._selected[id(stacked)]
        return _sliced(stacked, self.members)


def _sliced(stacked: LoraStack, members: slice | Tensor) -> LoraStack:
    scaling = stacked.scaling
    return LoraStack(
        stacked.down if stacked.shared else stacked.down[members],
        stacked.up[members],
        None if scaling is None else scaling[members],
    )


def delta(x: Tensor, stacked: LoraStack, routing: Routing) -> Tensor:
    """The adapters' term for x (rows, tokens, in): (rows, tokens, out), contiguous."""
    tokens = x.shape[1]
    part = routing.select(stacked)
    if part.shared:
        x = x @ part.down
    slots = x if routing.slot_rows is None else x.index_select(0, routing.slot_rows)
    slots = slots.reshape(routing.count, routing.width * tokens, x.shape[-1])
    hidden = slots if part.shared else torch.bmm(slots, part.down)
    if part.scaling is not None:
        hidden = hidden * part.scaling
    out = torch.bmm(hidden, part.up)
    out = out.view(routing.count * routing.width, tokens, -1)
    if routing.row_slots is not None:
        out = out.index_select(0, routing.row_slots)
    if routing.bare is not None:
        out.index_fill_(0, routing.bare, 0.0)
    return out


def _by_row(x: Tensor, rows: int, name: str) -> Tensor:
    """View x (rows, ..., in) or (rows * tokens, in) as (rows, tokens, in)."""
    if x.shape[0] % rows:
        raise ValueError(
            f"{name} got an input of shape {tuple(x.shape)} for {rows} rows: its tokens cannot be "
            "told apart by row, so it cannot carry an adapter per row"
        )
    return x.reshape(rows, -1, x.shape[-1])


def _linear_forward(
    module: nn.Linear | Conv1D,
    name: str,
    stacked: LoraStack,
    routing: Routing,
    x: Tensor,
) -> Tensor:
    out = delta(_by_row(x, routing.rows, name), stacked, routing)
    weight = module.weight if isinstance(module, Conv1D) else module.weight.t()
    out = out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight)
    if module.bias is not None:
        out += module.bias
    return out.view(*x.shape[:-1], -1)


def _wrapped_forward(
    original: Callable[[Tensor], Tensor],
    name: str,
    stacked: LoraStack,
    routing: Routing,
    x: Tensor,
) -> Tensor:
    out = original(x)
    return out + delta(_by_row(x, routing.rows, name), stacked, routing).view_as(out)


Target = tuple[nn.Module, LoraStack]


def build_stacks(model: nn.Module, adapters: Sequence[AdapterState]) -> dict[str, Target]:
    """Stacks by module name for members 0 .. n-1.

    Raises UserError for a module that the model lacks, that is no linear layer or whose shape the
    factors do not fit.
    """
    modules = dict(model.named_modules())
    names: dict[str, None] = {}
    for adapter in adapters:
        names.update(dict.fromkeys(adapter.factors))
    scalings = [float(adapter.scaling) for adapter in adapters]
    targets: dict[str, Target] = {}
    for name in names:
        module = modules.get(name)
        if module is None:
            raise UserError(f"the adapter changes {name!r}, which {type(model).__name__} lacks")
        weight = _weight(module, name)
        factors = [adapter.factors.get(name) for adapter in adapters]
        outputs, features = weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape
        for pair in factors:
            if pair is None:
                continue
            fits = pair.A.shape[1] == features and pair.B.shape[0] == outputs
            if not fits or pair.A.shape[0] != pair.B.shape[1]:
                raise UserError(
                    f"the adapter's factors for {name!r} are A {tuple(pair.A.shape)} and B "
                    f"{tuple(pair.B.shape)}: expected A (r, {features}) and B ({outputs}, r)"
                )
        targets[name] = (module, stack(factors, scalings, weight))
    return targets


def _weight(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | Conv1D) or not isinstance(weight, Tensor):
        raise UserError(
            f"the adapter changes {name!r}, a {type(module).__name__}: the batched engine adapts "
            "nn.Linear and Conv1D layers only"
        )
    if not weight.is_floating_point():
        raise UserError(
            f"the adapter changes {name!r}, whose weight is {weight.dtype}: the batched engine "
            "needs a floating-point weight"
        )
    return weight


@contextmanager
def patched(targets: Mapping[str, Target], routing: Routing | None) -> Iterator[None]:
    """Let each target's forward add the adapters of the batch's rows; undone on leaving."""
    if routing is None:
        yield
        return
    before: list[tuple[nn.Module, object]] = []
    try:
        for name, (module, stacked) in targets.items():
            forward: Callable[[Tensor], Tensor]
            if type(module) in (nn.Linear, Conv1D) and "forward" not in module.__dict__:
                forward = partial(_linear_forward, module, name, stacked, routing)
            else:
                forward = partial(_wrapped_forward, module.forward, name, stacked, routing)
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, original in reversed(before):
            if original is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = original
