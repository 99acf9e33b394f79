"""Causes that a reading rules out: what would have to show, was measured, and is not there."""

from __future__ import annotations

from collections.abc import Mapping

from loralab.health import thresholds as t
from loralab.health.condition import Condition, over, under
from loralab.health.reading import Reading

# What an adapter writes that outweighs its base tells nothing of the rows.
_IN_PROPORTION = under("weights.delta_ratio.max", t.DELTA_RATIO_BROKEN)

SIGNS: Mapping[str, tuple[Condition, ...]] = {
    "init.zero_factors": (over("weights.dead", t.DEAD_SOME),),
    "init.residual_missing": (over("weights.base_share", t.BASE_SHARE),),
    "init.unprepared": (over("setup.unprepared", t.UNPREPARED),),
    "optimiser.adapter_left_out": (
        over("setup.left_out", t.LEFT_OUT),
        over("update.none", t.STANDING_SOME),
    ),
    "spline.not_identity": (over("spline.deviation", t.SPLINE_START),),
    "spline.output_scale": (under("spline.output_scale", t.SPLINE_SCALE),),
    "lr.too_high": (over("train.dose", t.DOSE),),
    "lr.too_low": (under("train.dose", t.DOSE),),
    "numbers.nan": (over("train.nonfinite", t.NOT_FINITE), over("weights.nan", t.NOT_FINITE)),
    "data.newlines": (over("data.newline_share", t.LINE_BREAKS_SOME), over("data.blank", t.TRACE)),
    "data.eos_masked": (over("data.eos_missing", t.TRACE),),
    "data.all_masked": (over("data.all_masked", t.TRACE),),
    "data.shuffled": (over("data.shuffled", t.SHUFFLED),),
    "data.empty": (over("data.empty", t.TRACE),),
    "data.truncated": (over("data.truncated", t.TRACE),),
    "data.overweighted_token": (_IN_PROPORTION,),
    "collapse.mode": (_IN_PROPORTION,),
    "es.outlier_sigma": (over("es.dominance", t.DOMINANCE_SOME),),
}
"""By cause, what shows where it is true, one of these at least. A cause that may be true without
anything to see of it is not in here."""


def possible(causes: tuple[str, ...], reading: Reading) -> tuple[str, ...]:
    """The causes less those of which every sign was measured and none is there; all of them where
    that leaves none."""
    return tuple(cause for cause in causes if not _ruled_out(cause, reading)) or causes


def _ruled_out(cause: str, reading: Reading) -> bool:
    signs = SIGNS.get(cause, ())
    return bool(signs) and all(sign.known(reading) and not sign.holds(reading) for sign in signs)
