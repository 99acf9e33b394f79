"""Which runs there are: an item is what its plan does, so that what is the same is run once.

The controls `zero-b` and `code` on the same task are the plain LoRA that faults are set beside; a
rate that counted them as three would be narrower than it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loralab.bench.faults.faults import FAULTS
from loralab.bench.faults.healthy import CONTROLS, SETUPS
from loralab.bench.faults.plan import Change, Fault, Plan
from loralab.errors import UserError


@dataclass(frozen=True)
class Item:
    """One run to be done. kind: "fault", "healthy" (what faults are set beside) or "control".

    also: further names of the same run, controls' or setups'; they make no other item of it.
    """

    kind: str
    name: str
    world: str
    task: str
    seed: int
    also: tuple[str, ...] = field(default=(), compare=False)

    @property
    def path(self) -> Path:
        return Path(self.world) / self.task / f"{self.kind}-{self.name}-{self.seed}.json"


def items(
    worlds: Mapping[str, Any], only: Sequence[str] | None = None, few: bool = False
) -> list[Item]:
    """Every fault and control of the worlds, and the healthy runs that faults are set beside.

    worlds: by name its seeds, tasks, tasks_each; names of faults and controls where not all. only:
    names of faults and controls. few: one seed, one task.

    Raises:
        UserError: a name in `only` that there is not.
    """
    known = {fault.name for fault in FAULTS} | {control.name for control in CONTROLS}
    if strange := sorted(set(only or ()) - known):
        raise UserError(f"--only: no fault or control {strange[0]!r}; known: {', '.join(known)}")
    found: dict[Item, set[str]] = {}
    for world, wanted in worlds.items():
        if few:
            wanted = {**wanted, "seeds": wanted["seeds"][:1], "tasks_each": 1}
        for seed in wanted["seeds"]:
            for fault, task in _pairs(FAULTS, wanted, wanted.get("faults"), only, seed):
                item = Item("fault", fault.name, world, _task(SETUPS[fault.setup], task), seed)
                found.setdefault(beside(item), set()).add(fault.setup)
                found[item] = set()
            for control, task in _pairs(CONTROLS, wanted, wanted.get("controls"), only, seed):
                item = Item("control", control.name, world, _task(control.change, task), seed)
                found.setdefault(the_same(item), set()).add(control.name)
    order = ("healthy", "fault", "control")
    named = [replace(one, also=tuple(sorted(also - {one.name}))) for one, also in found.items()]
    return sorted(named, key=lambda item: order.index(item.kind))


def beside(item: Item) -> Item:
    """The healthy run that a fault's is set beside: same world, task and seed."""
    return the_same(replace(item, kind="healthy", name=fault_of(item.name).setup, also=()))


def the_same(item: Item) -> Item:
    """The first healthy run that does the same as this one, or this one."""
    mine = _comparable(plan_of(item), item)
    for setup in SETUPS:
        other = replace(item, kind="healthy", name=setup)
        if _comparable(plan_of(other), other) == mine:
            return other
    return item


def plan_of(item: Item, settings: Mapping[str, Any] | None = None) -> Plan:
    """What an item's run does. settings: of its world: steps, lr and so on."""
    plan = Plan(**dict(settings or {}))
    if item.kind == "control":
        next(one for one in CONTROLS if one.name == item.name).change(plan)
    else:
        fault = fault_of(item.name) if item.kind == "fault" else None
        SETUPS[item.name if fault is None else fault.setup](plan)
        if fault is not None:
            fault.change(plan)
    return plan


def fault_of(name: str) -> Fault:
    return next(one for one in FAULTS if one.name == name)


def _comparable(plan: Plan, item: Item) -> Plan:
    """A plan with the task that it is run on in its place. Functions of their own make plans
    differ, whatever they do."""
    return replace(plan, task=plan.task or item.task)


def _task(change: Change, task: str) -> str:
    """The task asked for, or the one that a plan is for."""
    plan = Plan()
    change(plan)
    return plan.task or task


def _pairs(
    table: Sequence[Any],
    wanted: Mapping[str, Any],
    names: Sequence[str] | None,
    only: Sequence[str] | None,
    seed: int,
) -> Iterator[tuple[Any, str]]:
    """Each with its tasks, in turn, so that seeds and neighbours see different ones."""
    tasks, each = wanted["tasks"], wanted["tasks_each"]
    for number, one in enumerate(table):
        if (names is None or one.name in names) and (only is None or one.name in only):
            for step in range(min(each, len(tasks))):
                yield one, tasks[(number + seed * each + step) % len(tasks)]
