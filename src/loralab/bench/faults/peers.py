"""Who else looks at a run: each judges the same log, and says FAIL, WARN or nothing.

trainproof: its `check_records` (package index, MIT) as it is. loss and gradients: plain rules that
many scripts hold. TRL: its metrics beside the loss, entropy and token accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from math import isfinite, nan
from statistics import fmean, median
from typing import Any, Literal

Opinion = Literal["fail", "warn", "none"]
Log = Sequence[Mapping[str, Any]]

FIRST = 5
RISE = 1.5
SPIKE = 10.0
FLAT = 0.02
ENTROPY_RISE = 1.5
ACCURACY_FALL = 0.1


def trainproof(log: Log) -> Opinion:
    """Of trainproof, given the steps' records and the evaluations'."""
    epoch = import_module("trainproof.epoch")
    names = {"lr": "learning_rate"} | {n: n for n in ("loss", "grad_norm", "eval_loss")}
    records = [
        {"step": row["step"], **{n: _number(row[of]) for n, of in names.items() if of in row}}
        for row in log
        if "loss" in row or "eval_loss" in row
    ]
    word = str(epoch.check_records(records)["verdict"]).lower()
    return "fail" if word == "fail" else "warn" if word == "warn" else "none"


def loss_and_gradients(log: Log) -> Opinion:
    """FAIL: a loss or gradient norm that is no number; the last losses RISE times the first; a
    training loss that moved by under FLAT. WARN: a gradient norm SPIKE times the median; a
    validation loss RISE times its lowest."""
    losses, norms = _column(log, "loss"), _column(log, "grad_norm")
    if not losses or not all(map(isfinite, (*losses, *norms))):
        return "fail"
    first, last = fmean(losses[:FIRST]), fmean(losses[-FIRST:])
    long = len(losses) >= 2 * FIRST
    if long and first > 0 and (last > RISE * first or abs(last - first) < FLAT * first):
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
    known: dict[str, Callable[[Log], Opinion]] = {
        "loss and gradients": loss_and_gradients,
        "TRL's metrics": trl,
    }
    return {"trainproof": trainproof} | known if find_spec("trainproof") else known
