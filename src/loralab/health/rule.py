"""What a rule is: the conditions under which it warns or fails, and what it then says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loralab.health.causes import MENDS, Evidence
from loralab.health.condition import Condition, cited, numbers_of
from loralab.health.findings import Finding, Severity
from loralab.health.reading import Reading, Readings
from loralab.health.ruled_out import possible

Moment = Literal["start", "training", "finished"]
"""Before the first step, during training, and of an adapter that lies there finished."""

_ALWAYS: tuple[Moment, ...] = ("start", "training", "finished")
_SHOWN = ("text.", "loss.", "kl", "entropy", "agreement", "es.")
_EXAMPLES = 2


def moment_of(reading: Reading) -> Moment:
    """From the value "train.step": 0 at the start, absent of a finished adapter."""
    step = reading.values.get("train.step")
    if step is None:
        return "finished"
    return "training" if step > 0 else "start"


@dataclass(frozen=True)
class Rule:
    """fail, warn: conditions, all of which have to hold. lasting: readings in a row that a failure
    has to hold in a run, before which it is a warning. since: the first step of a run that is
    judged. cause, also: ids of `causes.CAUSES`, the likeliest first; a finding leaves out those
    that its reading rules out. evidence: how much a finding says of its cause.
    """

    name: str
    cause: str
    also: tuple[str, ...] = ()
    fail: tuple[Condition, ...] = ()
    warn: tuple[Condition, ...] = ()
    evidence: Evidence = "typical"
    lasting: int = 1
    since: int = 0
    moments: tuple[Moment, ...] = _ALWAYS

    def judge(self, readings: Readings) -> Finding | None:
        """Of the newest reading, given those before."""
        newest = readings[-1]
        if not self.looks_at(newest):
            return None
        if self.fail and self._all(self.fail, newest):
            lasting = 1 if moment_of(newest) == "finished" else self.lasting
            recent = readings[-lasting:]
            if len(recent) == lasting and all(
                self.looks_at(one) and self._all(self.fail, one) for one in recent
            ):
                return self._finding("fail", self.fail, newest)
            return self._finding("warn", self.fail, newest)
        if self.warn and self._all(self.warn, newest):
            return self._finding("warn", self.warn, newest)
        return None

    def looks_at(self, reading: Reading) -> bool:
        """Whether it judges readings of that moment and step."""
        moment = moment_of(reading)
        return moment in self.moments and (moment == "finished" or reading.step >= self.since)

    def _all(self, conditions: Sequence[Condition], reading: Reading) -> bool:
        return all(condition.holds(reading) for condition in conditions)

    def _finding(
        self, severity: Severity, conditions: tuple[Condition, ...], reading: Reading
    ) -> Finding:
        shown = any(condition.value.startswith(_SHOWN) for condition in conditions)
        cause, *also = possible((self.cause, *self.also), reading)
        return Finding(
            rule=self.name,
            severity=severity,
            step=reading.step,
            message=cited(conditions, reading),
            numbers=numbers_of(conditions, reading),
            cause=cause,
            also=tuple(also),
            advice=MENDS[cause],
            examples=reading.examples[:_EXAMPLES] if shown else (),
        )
