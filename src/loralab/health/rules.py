"""Judging: all rules over what was measured, and the causes that the findings speak for.

A rule fails or warns when all its conditions of that severity hold. The base on the same prompts
is the measure wherever a healthy model may come near an absolute limit; a large KL alone means
nothing, since a deliberate change of style has one. What cannot be measured is not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loralab.health.causes import Evidence
from loralab.health.findings import Finding
from loralab.health.reading import Readings
from loralab.health.rule import Rule
from loralab.health.rules_data import CANARIES, DATA, PARITY
from loralab.health.rules_population import POPULATION
from loralab.health.rules_text import TEXT
from loralab.health.rules_training import NUMBERS, SPLINES, START

RULES: tuple[Rule, ...] = (
    *START,
    *NUMBERS,
    *TEXT,
    *DATA,
    *PARITY,
    *SPLINES,
    *CANARIES,
    *POPULATION,
)
"""The table. A rule's `fail` and `warn` each hold when all their conditions do."""


def judge(readings: Readings, rules: Sequence[Rule] | None = None) -> tuple[Finding, ...]:
    """What is wrong with the newest reading, given the ones before; failures first.

    rules: None takes RULES.
    """
    if not readings:
        return ()
    found = [rule.judge(readings) for rule in (RULES if rules is None else rules)]
    return tuple(
        sorted((one for one in found if one is not None), key=lambda f: f.severity != "fail")
    )


_WEIGHTS: dict[Evidence, float] = {"direct": 9.0, "typical": 3.0, "symptom": 1.0}
_TIE = 0.01


def causes(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The ids of CAUSES that the findings speak for, likeliest first.

    A cause weighs what its best evidence weighs: direct 9, typical 3, a symptom 1; half of that
    from a warning, and 1/2, 1/3, ... of it where a finding names it second, third, ... The sum
    over all findings decides between equals only, so that no number of symptoms outweighs one
    sight of the fault. A rule that is not in the table (a damaged file) has seen the fault itself.
    """
    evidence = {rule.name: rule.evidence for rule in RULES}
    best: dict[str, float] = {}
    total: dict[str, float] = {}
    for finding in findings:
        weight = _WEIGHTS[evidence.get(finding.rule, "direct")]
        weight *= 1.0 if finding.severity == "fail" else 0.5
        for place, cause in enumerate((finding.cause, *finding.also), start=1):
            best[cause] = max(best.get(cause, 0.0), weight / place)
            total[cause] = total.get(cause, 0.0) + weight / place
    return tuple(sorted(best, key=lambda cause: (-best[cause] - _TIE * total[cause], cause)))
