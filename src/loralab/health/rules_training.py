"""Rules on the start of an adapter, the numbers of its training, and its splines."""

from __future__ import annotations

from loralab.health import thresholds as t
from loralab.health.condition import over, over_base, under, under_base
from loralab.health.rule import Moment, Rule

_IN_A_RUN: tuple[Moment, ...] = ("start", "training")

# What is wrong before the first step. Later a KL or another loss may be what was asked for.
START = (
    Rule(
        "init.garbled",
        "init.garbled",
        ("init.residual_missing", "init.unprepared", "scale.wrong", "spline.not_identity"),
        fail=(over("kl", t.START_KL_BROKEN), over_base("loss.all", t.START_LOSS_BROKEN)),
        warn=(over("kl", t.START_KL),),
        evidence="direct",
        moments=("start",),
    ),
    Rule(
        "init.residual_missing",
        "init.residual_missing",
        fail=(
            over("weights.base_share", t.BASE_SHARE),
            under("weights.base_share", t.BASE_SHARE_MOST),
            over_base("loss.all", t.START_LOSS),
        ),
        warn=(
            over("weights.base_share", t.BASE_SHARE),
            under("weights.base_share", t.BASE_SHARE_MOST),
        ),
        evidence="direct",
        moments=("start", "finished"),
    ),
    Rule(
        "init.zero_factors",
        "init.zero_factors",
        fail=(over("weights.dead", t.DEAD_MOST),),
        warn=(over("weights.dead", t.DEAD_SOME),),
        evidence="direct",
    ),
    Rule(
        "init.unprepared",
        "init.unprepared",
        # Plain LoRA is what it falls back to: it costs what the preparation would have gained.
        warn=(over("setup.unprepared", t.UNPREPARED),),
        evidence="direct",
        moments=("start",),
    ),
    Rule(
        "setup.scaling",
        "scale.wrong",
        # What is saved is alpha: loaded again, the adapter is another than the one that learned.
        fail=(over("setup.scaling", t.SCALING),),
        evidence="direct",
    ),
    Rule(
        "scale.rows",
        "scale.wrong",
        ("lr.too_high",),
        fail=(under_base("data.rescaled_loss", t.RESCALED),),
        evidence="direct",
        moments=("finished",),
    ),
    Rule(
        "setup.memory",
        "memory.short",
        warn=(over("setup.memory_share", t.MEMORY),),
        evidence="direct",
        moments=("start",),
    ),
    Rule(
        "setup.left_out",
        "optimiser.adapter_left_out",
        fail=(over("setup.left_out", t.LEFT_OUT),),
        evidence="direct",
        moments=_IN_A_RUN,
    ),
)

NUMBERS = (
    Rule(
        "numbers.nan",
        "numbers.nan",
        ("lr.too_high", "data.all_masked"),
        fail=(over("train.nonfinite", t.NOT_FINITE),),
        evidence="direct",
    ),
    Rule(
        "weights.nan",
        "numbers.nan",
        ("file.corrupt", "lr.too_high"),
        fail=(over("weights.nan", t.NOT_FINITE),),
        evidence="direct",
    ),
    Rule(
        "text.failed",
        "numbers.nan",
        ("lr.too_high", "file.corrupt"),
        fail=(over("text.failed", t.FAILED),),
    ),
    Rule(
        "gradient.none",
        "init.zero_factors",
        ("data.all_masked", "optimiser.adapter_left_out"),
        fail=(over("grad.zero", t.GRADIENT_ZERO),),
        warn=(over("grad.zero", t.GRADIENT_ZERO_SOME),),
        lasting=2,
        since=5,
        moments=("training",),
    ),
    Rule(
        "gradient.spike",
        "lr.too_high",
        ("numbers.nan",),
        warn=(over("grad.spike", t.GRADIENT_SPIKE),),
        evidence="symptom",
        moments=("training",),
    ),
    Rule(
        "update.none",
        "optimiser.adapter_left_out",
        ("init.zero_factors", "data.all_masked"),
        fail=(over("update.none", t.STANDING),),
        warn=(over("update.none", t.STANDING_SOME),),
        lasting=2,
        since=5,
        moments=("training",),
    ),
    Rule(
        "update.large",
        "lr.too_high",
        ("scale.wrong",),
        warn=(over("update.ratio", t.UPDATE_RATIO),),
        since=5,
        moments=("training",),
    ),
    Rule(
        "loss.diverged",
        "lr.too_high",
        ("numbers.nan", "scale.wrong"),
        fail=(over("train.loss_rise", t.LOSS_RISE),),
        lasting=2,
        since=5,
        moments=("training",),
    ),
    Rule(
        "weights.large",
        "lr.too_high",
        ("scale.wrong", "init.garbled"),
        fail=(
            over("weights.delta_ratio.max", t.DELTA_RATIO_BROKEN),
            over_base("loss.all", t.LOSS_GAP),
        ),
        warn=(over("weights.delta_ratio.max", t.DELTA_RATIO),),
        moments=("training",),
    ),
    Rule(
        "weights.large_finished",
        "lr.too_high",
        ("scale.wrong",),
        warn=(
            over("weights.delta_ratio.max", t.DELTA_RATIO),
            under("weights.delta_ratio.max", t.DELTA_RATIO_BROKEN),
        ),
        moments=("finished",),
    ),
    Rule(
        "weights.outweigh",
        "scale.wrong",
        # A training that went so far is seen by its guard; what lies there may never have had one.
        # Direct: what texts show of such an adapter comes of its size.
        ("lr.too_high", "init.garbled"),
        fail=(
            over("weights.delta_ratio.max", t.DELTA_RATIO_BROKEN),
            over_base("loss.all", t.LOSS_GAP),
        ),
        warn=(over("weights.delta_ratio.max", t.DELTA_RATIO_BROKEN),),
        evidence="direct",
        moments=("finished",),
    ),
    Rule(
        "learning.little",
        "lr.too_low",
        ("optimiser.adapter_left_out", "spline.output_scale"),
        fail=(
            under("train.dose", t.DOSE),
            over("train.progress", t.LATE),
            over("train.step", t.NO_SMOKE_TEST),
            under("kl", t.UNMOVED_KL),
        ),
        warn=(under("train.dose", t.DOSE),),
        evidence="direct",
    ),
    Rule(
        "weights.idle",
        "save.keys_dropped",
        ("optimiser.adapter_left_out", "lr.too_low", "es.noise_too_weak"),
        # A search that found nothing better hands its start back, which is no damage.
        warn=(over("weights.idle", t.IDLE),),
        moments=("finished",),
    ),
)

SPLINES = (
    Rule(
        "spline.start",
        "spline.not_identity",
        ("spline.soft",),
        fail=(over("spline.deviation", t.SPLINE_START), over("kl", t.START_KL)),
        warn=(over("spline.deviation", t.SPLINE_START),),
        evidence="direct",
        moments=("start",),
    ),
    Rule(
        "spline.scale",
        "spline.output_scale",
        fail=(under("spline.output_scale", t.SPLINE_SCALE),),
        evidence="direct",
    ),
    Rule(
        "spline.outside",
        "spline.grid_too_narrow",
        fail=(over("spline.outside", t.SPLINE_OUTSIDE), over("spline.clamp", t.SPLINE_FLAG)),
        warn=(over("spline.outside", t.SPLINE_OUTSIDE),),
        evidence="direct",
    ),
    Rule(
        "spline.narrow",
        "spline.grid_too_narrow",
        warn=(under("spline.reach", t.SPLINE_REACH),),
        evidence="direct",
    ),
    Rule(
        "spline.tanh", "spline.tanh", warn=(over("spline.tanh", t.SPLINE_FLAG),), evidence="direct"
    ),
    Rule(
        "spline.soft",
        "spline.soft",
        ("spline.not_identity",),
        warn=(over("spline.soft", t.SPLINE_FLAG),),
        evidence="direct",
    ),
    Rule(
        "spline.penalty",
        "spline.penalty_off",
        warn=(under("spline.penalty", t.SPLINE_PENALTY),),
        evidence="direct",
    ),
)
