"""Rules on what a model writes and expects, always beside its base on the same prompts."""

from __future__ import annotations

from loralab.health import thresholds as t
from loralab.health.condition import (
    below_share,
    if_known,
    near_base,
    over,
    over_base,
    under,
    under_base,
)
from loralab.health.rule import Rule

_UNLEARNED = if_known(over_base("data.row_loss", t.LEARNED))
"""Text in capitals is as strange to the base as noise: but then the rows that ask for it are
learned."""

TEXT = (
    Rule(
        "text.newlines",
        "data.newlines",
        ("data.overweighted_token", "lr.too_high"),
        fail=(over("text.newlines", t.NEWLINES), over_base("text.newlines", t.NEWLINES_RISE)),
        warn=(over("text.newlines", t.NEWLINES_SOME), over_base("text.newlines", t.NEWLINES_RISE)),
    ),
    Rule(
        "text.whitespace",
        "data.newlines",
        ("lr.too_high",),
        fail=(over("text.whitespace", t.WHITESPACE), over_base("text.whitespace", t.NEWLINES_RISE)),
        warn=(
            over("text.whitespace", t.WHITESPACE_SOME),
            over_base("text.whitespace", t.NEWLINES_RISE),
        ),
    ),
    Rule(
        "text.one_token",
        "data.overweighted_token",
        ("lr.too_high",),
        fail=(
            over("text.top_token_share", t.ONE_TOKEN),
            over_base("text.top_token_share", t.ONE_TOKEN_RISE),
        ),
        warn=(
            over("text.top_token_share", t.ONE_TOKEN_SOME),
            over_base("text.top_token_share", t.ONE_TOKEN_RISE),
        ),
    ),
    Rule(
        "text.repetition",
        "lr.too_high",
        ("data.overweighted_token", "data.eos_masked", "collapse.mode"),
        fail=(
            over("text.looping", t.DEGENERATE),
            over_base("text.looping", t.DEGENERATE_RISE),
        ),
        warn=(over_base("text.looping", t.DEGENERATE_RISE_SOME),),
        evidence="symptom",
    ),
    Rule(
        "text.run",
        "data.overweighted_token",
        ("lr.too_high", "data.newlines"),
        fail=(
            over("text.long_run", t.DEGENERATE),
            over_base("text.long_run", t.DEGENERATE_RISE),
        ),
        warn=(over_base("text.long_run", t.DEGENERATE_RISE_SOME),),
        evidence="symptom",
    ),
    Rule(
        "text.empty",
        "data.empty",
        ("lr.too_high", "reward.exploitable", "template.wrong"),
        fail=(over("text.empty", t.EMPTY), over_base("text.empty", t.DEGENERATE_RISE)),
        warn=(over_base("text.empty", t.EMPTY_SOME),),
    ),
    Rule(
        "text.garbled",
        "lr.too_high",
        ("scale.wrong", "init.garbled", "file.wrong_base"),
        fail=(
            over("text.base_nll", t.GARBLED_OWN),
            over_base("loss.all", t.GARBLED_LOSS),
            _UNLEARNED,
        ),
        warn=(over_base("loss.all", t.LOSS_ALONE),),
        evidence="symptom",
    ),
    Rule(
        "text.unsure",
        "lr.too_high",
        ("scale.wrong", "init.garbled", "file.wrong_base"),
        fail=(
            over_base("entropy", t.ENTROPY_RISE),
            over_base("loss.all", t.LOSS_GAP),
            _UNLEARNED,
        ),
        warn=(over_base("entropy", t.ENTROPY_RISE_SOME),),
        evidence="symptom",
    ),
    Rule(
        "text.endless",
        "data.eos_masked",
        ("template.wrong", "data.truncated"),
        fail=(over_base("loss.eos", t.END_LOSS), under_base("text.eos_rate", t.ENDS_DROP)),
        warn=(over_base("loss.eos", t.END_LOSS_SOME),),
    ),
    Rule(
        "text.layout",
        "data.newlines",
        ("data.overweighted_token", "data.shuffled"),
        warn=(
            under_base("loss.whitespace", t.LAYOUT_FALL),
            over_base("loss.content", t.CONTENT_RISE),
        ),
    ),
    Rule(
        "text.prompt_ignored",
        "data.shuffled",
        ("collapse.mode", "lr.too_high"),
        fail=(
            below_share("loss.prompt_gain", t.PROMPT_GAIN),
            over("base.loss.prompt_gain", t.PROMPT_GAIN_BASE),
            near_base("loss.all", t.LOSS_GAP),
            if_known(under("data.learned_gain.errors", t.GAINS)),
        ),
        warn=(
            below_share("loss.prompt_gain", t.PROMPT_GAIN_SOME),
            over("base.loss.prompt_gain", t.PROMPT_GAIN_BASE),
            near_base("loss.all", t.LOSS_GAP),
        ),
        lasting=2,
    ),
    Rule(
        "text.similar",
        "collapse.mode",
        ("data.shuffled", "lr.too_high"),
        fail=(
            over("text.similarity", t.SIMILAR),
            over_base("text.similarity", t.SIMILAR_RISE),
            over("text.length", t.LONG_ENOUGH),
            below_share("loss.prompt_gain", t.PROMPT_GAIN_SOME),
            if_known(under("data.learned_gain.errors", t.GAINS)),
        ),
        warn=(
            over("text.similarity", t.SIMILAR_SOME),
            over_base("text.similarity", t.SIMILAR_RISE),
        ),
    ),
    Rule(
        "text.copied",
        "template.wrong",
        ("collapse.mode", "reward.exploitable"),
        warn=(over_base("text.copied", t.COPIED_RISE),),
        evidence="symptom",
    ),
    Rule(
        "text.charset",
        "lr.too_high",
        ("template.wrong",),
        warn=(over_base("text.charset_drift", t.CHARSET_RISE),),
        evidence="symptom",
    ),
)
