"""Rules on the rows that are learned, the files that are kept, and the scores that are given."""

from __future__ import annotations

from loralab.health import thresholds as t
from loralab.health.condition import below_share, over, over_base, under
from loralab.health.rule import Rule

DATA = (
    Rule(
        "data.all_masked",
        "data.all_masked",
        fail=(over("data.all_masked", t.MASKED),),
        warn=(over("data.all_masked", t.MASKED_SOME),),
        evidence="direct",
    ),
    Rule(
        "data.eos_missing",
        "data.eos_masked",
        fail=(over("data.eos_missing", t.ENDLESS_ROWS), over("data.prompted", t.PROMPTED)),
        warn=(over("data.eos_missing", t.ENDLESS_ROWS),),
        evidence="direct",
    ),
    Rule(
        "data.pad_is_eos_masked",
        "data.eos_masked",
        fail=(over("data.pad_is_eos_masked", t.PAD_IS_END), over("data.prompted", t.PROMPTED)),
        warn=(over("data.pad_is_eos_masked", t.PAD_IS_END),),
        evidence="direct",
    ),
    Rule(
        "data.double_bos",
        "data.double_bos",
        ("template.wrong",),
        warn=(over("data.double_bos", t.DOUBLE_START),),
        evidence="direct",
    ),
    Rule(
        "data.newlines",
        "data.newlines",
        fail=(over("data.newline_share", t.LINE_BREAKS),),
        warn=(over("data.newline_share", t.LINE_BREAKS_SOME),),
        evidence="direct",
    ),
    Rule(
        "data.one_token",
        "data.overweighted_token",
        warn=(over("data.excess_token", t.EXCESS),),
        evidence="direct",
    ),
    Rule(
        "data.shuffled",
        "data.shuffled",
        fail=(
            over("data.shuffled", t.SHUFFLED),
            below_share("loss.prompt_gain", t.SHUFFLED_GAIN),
            over("base.loss.prompt_gain", t.PROMPT_GAIN_BASE),
        ),
        warn=(over("data.shuffled", t.SHUFFLED),),
        evidence="direct",
    ),
    Rule(
        "data.shuffled_answers",
        "data.shuffled",
        fail=(
            over("data.shuffled", t.SHUFFLED),
            under("data.pair_gain", t.PAIR_GAIN),
            over("data.answer_length", t.ANSWER_LENGTH),
        ),
        evidence="direct",
    ),
    Rule(
        "data.template",
        "template.wrong",
        fail=(over("data.template_mismatch", t.TEMPLATE),),
        warn=(over("data.template_mismatch", t.TEMPLATE_SOME),),
        evidence="direct",
    ),
    Rule(
        "data.few",
        "data.too_few",
        fail=(
            over("data.passes", t.PASSES),
            under("data.rows", t.FEW_ROWS),
            under("train.loss_share", t.MEMORISED),
            over_base("loss.content", t.MEMORISED_RISE),
        ),
        warn=(over("data.passes", t.PASSES), under("data.rows", t.FEW_ROWS)),
        evidence="direct",
    ),
    Rule(
        "data.truncated",
        "data.truncated",
        ("data.eos_masked",),
        warn=(over("data.truncated", t.CUT_ROWS),),
        evidence="direct",
    ),
    Rule(
        "data.contaminated",
        "data.contaminated",
        warn=(over("data.contaminated", t.CONTAMINATED),),
        evidence="direct",
    ),
    Rule(
        "data.duplicates",
        "data.duplicates",
        warn=(over("data.duplicate_share", t.REPEATED_ROWS),),
        evidence="direct",
    ),
)

PARITY = (
    Rule("parity.merge", "merge.unequal", fail=(over("parity.merge", t.MERGE),), evidence="direct"),
    Rule(
        "parity.reload",
        "save.keys_dropped",
        fail=(over("parity.reload", t.RELOAD),),
        evidence="direct",
    ),
    Rule(
        "parity.keys_missing",
        "save.keys_dropped",
        fail=(over("parity.keys_missing", t.KEYS),),
        evidence="direct",
    ),
    Rule(
        "parity.keys_unexpected",
        "file.wrong_base",
        ("save.keys_dropped",),
        warn=(over("parity.keys_unexpected", t.KEYS),),
        evidence="direct",
    ),
)

_UNEARNED = ("empty", "newlines", "copied", "options")
CANARIES = (
    *(
        Rule(
            f"canary.{name}",
            "reward.exploitable",
            ("evaluation.first_match", "evaluation.reads_context"),
            fail=(over(f"canary.{name}", t.CANARY),),
            warn=(over(f"canary.{name}", t.CANARY_SOME),),
        )
        for name in _UNEARNED
    ),
    Rule(
        "canary.identity",
        "evaluation.baseline",
        fail=(over("canary.identity", t.IDENTITY),),
        evidence="direct",
    ),
    Rule(
        "canary.baseline",
        "evaluation.baseline",
        fail=(over("canary.baseline", t.BASELINE),),
        evidence="direct",
    ),
    Rule(
        "canary.prompts_distinct",
        "evaluation.reads_context",
        fail=(under("canary.prompts_distinct", t.ONE_PROMPT),),
        evidence="direct",
    ),
    Rule(
        "canary.last_answer",
        "evaluation.first_match",
        fail=(under("canary.last_answer", t.LAST_ANSWER),),
        evidence="direct",
    ),
)
