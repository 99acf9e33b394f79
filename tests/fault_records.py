"""Made-up records of the fault benchmark, of runs in which nothing is wrong unless said, and their
tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loralab.bench.faults.items import Item, fault_of
from loralab.bench.faults.judgement import judged
from loralab.bench.faults.sections import Groups
from loralab.bench.table import Section
from loralab.health.reading import Reading
from loralab.health.rule import Rule
from loralab.health.rules import RULES


def log(losses: list[float], **columns: list[float]) -> list[dict[str, Any]]:
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


def validated(losses: Mapping[int, Any]) -> list[dict[str, Any]]:
    return [{"step": step, "eval_loss": loss} for step, loss in losses.items()]


def record(**changes: Any) -> dict[str, Any]:
    used = {"score": 0.9, "right": [True] * 9 + [False], "perplexity": 2.0, "repetition": 0.0}
    return {
        "steps": 60,
        "seconds": 10.0,
        "train_seconds": 5.0,
        "guard_seconds": 1.0,
        "guard_share": 0.1,
        "log": [*log([2.0, 1.5]), *validated({0: 2.0, 60: 1.5})],
        "readings": [],
        "findings": [],
        "doctor": {"readings": [], "findings": [], "seconds": 2.0},
        "used": used,
        **changes,
    }


def worse(**used: Any) -> dict[str, Any]:
    made = record()
    made["used"] = {**made["used"], **used}
    return made


def useless(**changes: Any) -> dict[str, Any]:
    """Of a run whose answers are all wrong."""
    return worse(score=0.0, right=[False] * 10) | changes


def readings(values: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Of a run, by step."""
    return [
        Reading(step, {"train.step": float(step), **seen}, (), 0.0).to_json()
        for step, seen in values.items()
    ]


def doctor(*values: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """What it read of a finished adapter."""
    rows = [Reading(0, seen, (), 0.0).to_json() for seen in values]
    return {"readings": rows, "findings": [], "seconds": 2.0, **more}


def item(
    kind: str, name: str, task: str = "code", seed: int = 0, also: tuple[str, ...] = ()
) -> Item:
    return Item(kind, name, "small", task, seed, also)


def rule(name: str) -> Rule:
    return next(one for one in RULES if one.name == name)


def newlines(share: float) -> dict[str, Any]:
    """Of a run that wrote this share of newlines at step 5."""
    return record(readings=readings({5: {"text.newlines": share, "base.text.newlines": 0.0}}))


def table(section: Section) -> dict[Any, dict[str, Any]]:
    """Rows by their first cell, cells by column."""
    return {row[0]: dict(zip(section.columns, row, strict=True)) for row in section.rows}


def section(made: Any, heading: str) -> dict[Any, dict[str, Any]]:
    return table(next(one for one in made.sections if one.heading == heading))


def judged_runs(
    records: Mapping[Item, Mapping[str, Any]], peers: Mapping[str, Any] | None = None
) -> Groups:
    """Groups as the page makes them, harm taken for granted."""
    groups = Groups()
    for one, row in records.items():
        fault = fault_of(one.name) if one.kind == "fault" else None
        made = judged(row, fault, record() if fault else None, peers or {})
        (groups.healthy if fault is None else groups.harmful)[one] = made
    return groups
