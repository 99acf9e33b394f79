"""A finished run: what its guard measured and found, and what it left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loralab import durable
from loralab.health.doctor import Report, diagnose, diagnose_adapter
from loralab.health.findings import Finding
from loralab.health.ledger import FINDINGS, READINGS
from loralab.health.reading import Reading
from loralab.health.rules import judge
from loralab.models.load import load
from loralab.run import Run

_NO_BASE = {"pretrain"}
_OTHERS = {"classify", "seq2seq", "verifier"}


def examine_run(
    path: Path,
    base: Any = None,
    tokenizer: Any = None,
    dtype: str | None = None,
    device: str | None = None,
    **looking: Any,
) -> Report:
    """What a run's guard measured and found, and the adapter or model that the run left.

    base, dtype, device: None takes those of the run's config. What the adapter itself shows takes
    the place of what the guard saw of it before; that is told as a note, with its step.

    Raises:
        UserError: no run, or its model cannot be had.
    """
    began = time.perf_counter()
    run = Run.open(path)
    config = run.config
    named = str(config["model"]) if config.get("model") else None
    dtype = dtype or str(config.get("dtype", "bfloat16"))
    device = device or str(config.get("device", "auto"))
    notes: list[str] = []
    left: Report | None = None
    if config.get("kind") in _OTHERS:
        notes.append(f"kind is {config['kind']}: what it trained answers with no text; not run")
    elif run.adapter.is_dir():
        left = diagnose_adapter(
            run.adapter,
            base or named,
            tokenizer,
            dtype=dtype,
            device=device,
            quantization=config.get("quantization"),
            **looking,
        )
    elif folder := _model_in(run):
        model, found = load(folder, dtype, device)
        beside = base
        if beside is None and config.get("kind") not in _NO_BASE:
            beside = named
        second = load(beside, dtype, device)[0] if isinstance(beside, str) else beside
        left = diagnose(model, tokenizer or found, base=second, **looking)
    else:
        notes.append("the run has left neither an adapter nor a model (yet)")
    if left is None:
        left = Report(str(path), "run", named, ())
    left = with_history(left, path)
    return replace(
        left,
        subject=str(path),
        notes=(*left.notes, *notes),
        seconds=time.perf_counter() - began,
    )


def _model_in(run: Run) -> Path | None:
    """Where a run that trained a whole model has left it."""
    folders = (run.path / name for name in ("model", "merged"))
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def with_history(report: Report, folder: Path) -> Report:
    """The report, and what a guard wrote into this folder: at its last look, or before."""
    readings = tuple(_parsed(Reading.from_json, durable.read_lines(folder / READINGS)))
    earlier = tuple(_parsed(Finding.from_json, durable.read_lines(folder / FINDINGS)))
    if not readings and not earlier:
        return report
    last = readings[-1].step if readings else 0
    seen = set(report.readings[-1].values) if report.readings else set[str]()
    told = [*judge(readings), *(one for one in earlier if one.step >= last)]
    at_last = {one.rule: one for one in told if not _measured_by(one, seen)}
    others = {(one.rule, one.step): one for one in (*earlier, *told) if one.rule not in at_last}
    known = {one.rule for one in report.findings}
    findings = [*report.findings, *(f for f in at_last.values() if f.rule not in known)]
    findings.sort(key=lambda one: one.severity != "fail")
    notes = [
        f"step {one.step}: {one.severity} {one.rule}: {one.message}"
        for one in sorted(others.values(), key=lambda one: one.step)
    ]
    return replace(
        report,
        findings=tuple(findings),
        readings=(*readings, *report.readings),
        notes=(*report.notes, *notes),
    )


def _measured_by(finding: Finding, names: set[str]) -> bool:
    values = [name for name in finding.numbers if not name.startswith(("limit.", "base."))]
    return bool(values) and all(name in names for name in values)


def _parsed(read: Callable[[Mapping[str, Any]], Any], lines: Iterable[Mapping[str, Any]]) -> Any:
    """Lines that are of this form; runs of an earlier version have others."""
    for line in lines:
        try:
            yield read(line)
        except (KeyError, TypeError, ValueError):
            continue
