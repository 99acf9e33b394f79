"""Rules on a population: what `population` measures of a generation and those before."""

from __future__ import annotations

from loralab.health import thresholds as t
from loralab.health.condition import if_known, over, under
from loralab.health.rule import Rule

POPULATION = (
    Rule(
        "es.silent",
        "es.noise_too_weak",
        ("reward.exploitable",),
        # A pair's means differ as soon as one text of many prompts does: that alone is no signal.
        # Members that have found the answers agree too, and so do those that are sure of theirs.
        fail=(
            under("es.distinct", t.SAME_TEXTS),
            under("es.correct", t.UNSOLVED),
            if_known(under("es.reward_up", t.REWARD_UP)),
            if_known(under("es.member_kl", t.MEMBER_KL_SOME)),
        ),
        warn=(under("es.informative", t.INFORMATIVE_SOME), under("es.correct", t.UNSOLVED)),
        since=4,
    ),
    Rule(
        "es.ties",
        "es.noise_too_weak",
        warn=(over("es.ties", t.TIES), under("es.correct", t.UNSOLVED)),
        evidence="symptom",
        since=4,
    ),
    Rule(
        "es.weak_noise",
        "es.noise_too_weak",
        fail=(under("es.member_kl", t.MEMBER_KL),),
        warn=(under("es.member_kl", t.MEMBER_KL_SOME),),
        evidence="direct",
        moments=("start",),
    ),
    Rule(
        "es.noop",
        "es.noise_too_weak",
        fail=(over("es.noop", t.NO_OP),),
        warn=(over("es.noop", t.NO_OP_SOME),),
        evidence="direct",
    ),
    Rule(
        "es.dominance",
        "es.outlier_sigma",
        fail=(over("es.dominance", t.DOMINANCE),),
        warn=(over("es.dominance", t.DOMINANCE_SOME),),
        evidence="direct",
    ),
    Rule(
        "es.broken_members",
        "es.noise_too_strong",
        ("es.outlier_sigma",),
        warn=(over("es.repetition", t.GARBLED_MEMBERS),),
    ),
    Rule(
        "es.held_out_gap",
        "es.overfit",
        ("reward.exploitable",),
        warn=(over("es.held_out_gap", t.GAP),),
    ),
    Rule(
        "es.reward_alone",
        "reward.exploitable",
        ("es.overfit",),
        warn=(over("es.reward_up", t.REWARD_UP), under("es.correct_up", t.CORRECT_STANDS)),
    ),
    Rule(
        "es.second_measure",
        "reward.exploitable",
        ("es.overfit",),
        fail=(
            over("es.reward_up", t.REWARD_UP),
            over("es.second_measure", t.SECOND_DOWN),
            over("es.second_fall", t.SECOND_FALL),
        ),
        warn=(
            over("es.second_measure", t.SECOND_DOWN),
            over("es.second_fall", t.SECOND_FALL),
        ),
        evidence="direct",
    ),
    Rule(
        "es.unearned",
        "reward.exploitable",
        fail=(over("es.unearned", t.UNEARNED),),
        warn=(over("es.unearned", t.CANARY),),
        evidence="direct",
    ),
)
