"""Readings as guards and doctors hand them to rules: of healthy runs, for tests to spoil."""

from __future__ import annotations

import math

from loralab.health.findings import Example
from loralab.health.reading import Reading
from loralab.health.rules import judge

BASE = {
    "text.looping": 0.08,
    "text.long_run": 0.0,
    "text.newlines": 0.05,
    "text.whitespace": 0.2,
    "text.top_token_share": 0.08,
    "text.empty": 0.0,
    "text.eos_rate": 0.6,
    "text.similarity": 0.05,
    "text.copied": 0.1,
    "text.charset_drift": 0.0,
    "text.length": 40.0,
    "loss.all": 1.4,
    "loss.content": 1.9,
    "loss.whitespace": 0.3,
    "loss.eos": 0.8,
    "loss.prompt_gain": 0.9,
    "entropy": 1.3,
}
"""What SmolLM2 is like, about."""

SOUND = {
    **BASE,
    "kl": 0.15,
    "text.base_nll": 0.6,
    "weights.nan": 0.0,
    "weights.dead": 0.0,
    "weights.base_share": 0.01,
    "weights.delta_ratio.max": 0.03,
    "setup.left_out": 0.0,
    "setup.scaling": 0.0,
    "train.nonfinite": 0.0,
    "train.dose": 1e-2,
    "train.progress": 0.5,
    "train.loss_rise": -0.3,
    "train.loss_share": 0.6,
    "grad.zero": 0.0,
    "grad.spike": 1.2,
    "update.ratio": 0.005,
    "update.none": 0.0,
    "data.all_masked": 0.0,
    "data.eos_missing": 0.0,
    "data.newline_share": 0.1,
    "data.shuffled": 0.05,
    "data.excess_token": 0.1,
    "data.template_mismatch": 0.0,
    "data.rows": 2000.0,
    "data.passes": 1.0,
}
"""A healthy training in its middle."""

START = {
    **SOUND,
    "kl": 1e-4,
    "train.step": 0.0,
    "train.progress": 0.0,
    "weights.delta_ratio.max": 0.0,
    "update.none": math.nan,
    "grad.zero": math.nan,
}


def reading(step: int = 50, **values: float) -> Reading:
    """A look in training; `a__b` is "a.b"."""
    named = {name.replace("__", "."): value for name, value in values.items()}
    start = START if step == 0 else SOUND | {"train.step": float(step)}
    base = {f"base.{name}": value for name, value in BASE.items()}
    text = (Example("Say hi.", "\n\n\n", "Hi!"), Example("2+2?", "\n", "4"), Example("a", "b", "c"))
    return Reading(step, start | base | named, text, 0.1)


def fails(*readings: Reading) -> list[str]:
    return [one.rule for one in judge(readings) if one.severity == "fail"]


GARBLED = {"text__base_nll": 8.0, "loss__all": 6.0, "entropy": 5.0}

OVERSIZED = {
    "weights.delta_ratio.max": 40.0,
    "text.base_nll": 8.0,
    "loss.all": 7.0,
    "base.loss.all": 1.4,
}
"""A finished adapter, of which neither training nor rows are known."""

SHUFFLED = {
    **reading().values,
    "data.shuffled": 0.5,
    "data.pair_gain.errors": 0.1,
    "data.learned_gain.errors": -0.4,
    "data.row_loss": 0.9,
    "base.data.row_loss": 3.0,
}
