"""Who else looks at a run: each judges the same log, and says FAIL, WARN or nothing.

trainproof: its own command's way, `trainproof epoch trainer_state.json --format hf` (package index,
MIT). loss and gradients: plain rules that many scripts hold. TRL: its metrics beside the loss,
entropy and token accuracy; it gives no verdict, so the limits on them are ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from math import isfinite, nan
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any, Literal

Opinion = Literal["fail", "warn", "none"]
Log = Sequence[Mapping[str, Any]]

FIRST = 5
RISE = 1.5
SPIKE = 10.0
FLAT = 0.02
ENTROPY_RISE = 1.5
ACCURACY_FALL = 0.1
SPARSE, POINTS = 5, 10


def trainproof(log: Log) -> Opinion:
    """Of trainproof, given the run's trainer_state.json."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trainer_state.json"
        path.write_text(json.dumps({"log_history": list(log)}), encoding="utf-8")
        report = import_module("trainproof.epoch").check_epoch(path, "hf")
    word = str(report["verdict"])
    return "fail" if word == "FAIL" else "warn" if word == "WARN" else "none"


def trainproof_sparse(log: Log) -> Opinion:
    """The same, had the Trainer logged every SPARSE steps, or fewer where a run is so short that
    this leaves under POINTS rows: single steps' losses scatter, and a few rows tell little."""
    steps = sum("loss" in row for row in log)
    return trainproof(list(_every(max(1, min(SPARSE, steps // POINTS)), log)))


def _every(steps: int, log: Log) -> Iterator[Mapping[str, Any]]:
    """As a Trainer logs with logging_steps=steps: mean losses, of all else the newest."""
    waiting: list[float] = []
    for row in log:
        if "loss" not in row:
            yield row
            continue
        waiting.append(_number(row["loss"]))
        if int(row["step"]) % steps == 0:
            yield {**row, "loss": fmean(waiting)}
            waiting = []


def loss_and_gradients(log: Log) -> Opinion:
    """FAIL: a loss or gradient norm that is no number; the last losses RISE times the first; a
    training loss that moved by under FLAT. WARN: a gradient norm SPIKE times the median; a
    validation loss RISE times its lowest."""
    losses, norms = _column(log, "loss"), _column(log, "grad_norm")
    if not losses or not all(map(isfinite, (*losses, *norms))):
        return "fail"
    first, last = fmean(losses[:FIRST]), fmean(losses[-FIRST:])
    # A loss of exactly 0 throughout is flat, too.
    flat = abs(last - first) <= FLAT * abs(first)
    if len(losses) >= 2 * FIRST and (last > RISE * first or flat):
        return "fail"
    held_out = _column(log, "eval_loss")
    over = bool(held_out) and held_out[-1] > RISE * min(held_out)
    spike = bool(norms) and max(norms[FIRST:], default=0.0) > SPIKE * median(norms)
    return "warn" if over or spike else "none"


def trl(log: Log) -> Opinion:
    """FAIL: entropy ENTROPY_RISE times the first, or token accuracy ACCURACY_FALL lower. WARN:
    neither moved the right way."""
    entropy, accuracy = _column(log, "entropy"), _column(log, "mean_token_accuracy")
    if len(entropy) < 2 * FIRST or len(accuracy) < 2 * FIRST:
        return "none"
    before, after = fmean(entropy[:FIRST]), fmean(entropy[-FIRST:])
    gain = fmean(accuracy[-FIRST:]) - fmean(accuracy[:FIRST])
    if not isfinite(after) or after > ENTROPY_RISE * before or gain < -ACCURACY_FALL:
        return "fail"
    return "warn" if gain <= 0 else "none"


def _column(log: Log, name: str) -> list[float]:
    return [_number(row[name]) for row in log if name in row]


def _number(value: Any) -> float:
    """Of a record, which writes what is no number as text."""
    return nan if value is None else float(value)


def peers() -> dict[str, Callable[[Log], Opinion]]:
    """By name; trainproof where it is installed."""
    known: dict[str, Callable[[Log], Opinion]] = {}
    if find_spec("trainproof"):
        known = {"trainproof": trainproof, "trainproof, sparse log": trainproof_sparse}
    return known | {"loss and gradients": loss_and_gradients, "TRL's metrics": trl}
