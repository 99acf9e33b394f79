"""Rules on the rows that are learned, the files that are kept, and the scores that are given."""

from __future__ import annotations

from loralab.health import thresholds as t
from loralab.health.condition import below_share, if_known, over, over_base, under
from loralab.health.rule import Rule

# Answers fit another row's prompt as well as their own, says a base that reads its prompts. What is
# line breaks for the most part fits any, and has a rule of its own.
_INTERCHANGEABLE = (
    over("data.shuffled", t.SHUFFLED),
    under("data.pair_gain.errors", t.CHANCE),
    over("base.loss.prompt_gain", t.PROMPT_GAIN_BASE),
    if_known(under("data.newline_share", t.LINE_BREAKS)),
)

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
        "data.padding_learned",
        "data.padding_learned",
        warn=(over("data.padding_learned", t.PADDING),),
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
        "data.blank",
        "data.newlines",
        fail=(over("data.blank", t.BLANK),),
        warn=(over("data.blank", t.BLANK_SOME),),
        evidence="direct",
    ),
    Rule(
        "data.empty",
        "data.empty",
        fail=(over("data.empty", t.BLANK),),
        warn=(over("data.empty", t.BLANK_SOME),),
        evidence="direct",
    ),
    Rule(
        "data.overexpected",
        "data.overweighted_token",
        ("lr.too_high",),
        fail=(over_base("data.overexpected", t.OVEREXPECTED),),
        warn=(over_base("data.overexpected", t.OVEREXPECTED_SOME),),
        since=5,
    ),
    Rule(
        "data.shuffled",
        "data.shuffled",
        warn=_INTERCHANGEABLE,
        evidence="direct",
    ),
    Rule(
        "data.shuffled_learned",
        "data.shuffled",
        fail=(
            *_INTERCHANGEABLE,
            under("data.learned_gain.errors", t.CHANCE),
            # A base may tell one kind of prompt from another and no more, and so may a model that
            # has learned little; what is learned of shuffled rows owes nothing to their prompts.
            below_share("data.row_loss", t.ROWS_LEARNED),
            if_known(over("train.progress", t.SHUFFLED_LATE)),
        ),
        evidence="direct",
        lasting=2,
        # One reading of what is finished does not tell shuffled rows from such as say the same to
        # every prompt: `data.shuffled` warns of both.
        moments=("training",),
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
            fail=(over(f"canary.{name}.share", t.CANARY),),
            warn=(over(f"canary.{name}.share", t.CANARY_SOME),),
        )
        for name in _UNEARNED
    ),
    *(
        Rule(
            f"canary.{name}_over_base",
            "reward.exploitable",
            ("evaluation.first_match", "evaluation.reads_context"),
            fail=(
                over(f"canary.{name}.errors", t.ERRORS),
                over(f"canary.{name}.share", t.CANARY_SOME),
            ),
            # Without gold answers nobody knows whether it is much.
            warn=(
                over(f"canary.{name}.errors", t.ERRORS),
                if_known(over(f"canary.{name}.share", t.CANARY_SOME)),
            ),
        )
        for name in _UNEARNED
    ),
    Rule(
        "canary.gold",
        "evaluation.first_match",
        fail=(under("canary.gold_right", t.GOLD_RIGHT),),
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
        fail=(over("canary.baseline", t.BASELINE), over("canary.baseline.errors", t.ERRORS)),
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
        warn=(under("canary.last_answer", t.LAST_ANSWER_SOME),),
        evidence="direct",
    ),
)
