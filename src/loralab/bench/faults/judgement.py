"""What records of runs mean: harmful or not, who noticed, when, and what they took it for.

Nothing is run here: rules and limits may change, and the same runs are judged again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from loralab.bench.faults.plan import Fault
from loralab.bench.faults.statistics import sign_test
from loralab.health.findings import Finding
from loralab.health.reading import Reading
from loralab.health.rules import causes, judge

Record = Mapping[str, Any]

SCORE_LOST, SIGNIFICANT = 0.15, 0.05
NATS_LOST = 0.2
LOOPS_MORE = 0.2
MISREPORTED = 0.1
"""What counts as worse than the same run without the fault: right answers (and the exact test of
the pairs), nats a token on held-out stories, answers that loop; or, of a broken evaluation, the
reported gain off the real one."""

VISIBLE = 1.1
"""The validation loss shows a harm once it is so many times its own lowest, or no number."""


@dataclass(frozen=True)
class Judged:
    """One run of a fault or a healthy one. harmful: None of a healthy run, or without the run to
    compare with. worse: by how much, in the unit of the harm. step: of the first FAIL of the
    guard; by: who failed it first. lead: steps from there to where the validation loss shows it,
    to the end where it never does; shown: whether it does."""

    record: Record
    harmful: bool | None
    worse: float
    failed: bool
    warned: bool
    by: str
    step: int | None
    lead: int | None
    shown: bool
    causes: tuple[str, ...]
    named: bool
    rules: tuple[str, ...]
    peers: Mapping[str, str]


def judged(
    record: Record, fault: Fault | None, reference: Record | None, peers: Mapping[str, Any]
) -> Judged:
    """One record; reference: the same run without the fault, of the same seed."""
    seen = guard_findings(record)
    told = doctor_findings(record)
    fails = [one for one in seen if one.severity == "fail"]
    doctored = any(one.severity == "fail" for one in told)
    ranked = causes([*seen, *told])
    worse = inf if fault is None or reference is None else harm(fault, record, reference)
    step = min((one.step for one in fails), default=None)
    failed = step is not None or doctored
    at = visible(record)
    of = int(record["steps"])
    detected = of if step is None else step
    return Judged(
        record=record,
        harmful=None if fault is None or reference is None else worse >= 1,
        worse=worse,
        failed=failed,
        warned=not failed and bool(seen or told),
        by="guard" if step is not None else "doctor" if doctored else "",
        step=step,
        lead=(of if at is None else at) - detected if failed else None,
        shown=at is not None,
        causes=ranked[:2],
        named=fault is not None and bool(set(fault.causes) & set(ranked[:2])),
        rules=tuple(
            dict.fromkeys(
                one.rule for one in (*seen, *told) if one.severity == "fail" or not failed
            )
        ),
        peers={name: opinion(record["log"]) for name, opinion in peers.items()},
    )


def guard_findings(record: Record) -> list[Finding]:
    """As the guard's rules of today judge what it measured. Of a search, whose generations are
    judged by numbers that are not in the readings, what its guard said then."""
    said = [Finding.from_json(row) for row in record["findings"]]
    if "generations" in record:
        return said
    readings = [Reading.from_json(row) for row in record["readings"]]
    looked = {reading.step for reading in readings}
    # A step without a look is judged at once where its numbers are not finite.
    found = [one for one in said if one.step not in looked]
    standing: set[tuple[str, str]] = set()
    for upto in range(1, len(readings) + 1):
        now = judge(readings[:upto])
        found += [one for one in now if (one.rule, one.severity) not in standing]
        standing = {(one.rule, one.severity) for one in now}
    return found


def doctor_findings(record: Record) -> list[Finding]:
    """As the rules of today judge what the doctor measured; of files what it said then."""
    readings = [Reading.from_json(row) for row in record["doctor"]["readings"]]
    found = [one for reading in readings for one in judge([reading])]
    known = {one.rule for one in found}
    said = [Finding.from_json(row) for row in record["doctor"]["findings"]]
    return found + [one for one in said if one.rule.startswith("file.") and one.rule not in known]


def harm(fault: Fault, record: Record, reference: Record) -> float:
    """How much worse than without the fault, 1 where it begins to count."""
    if "evaluation" in record:
        told = record["evaluation"]
        return abs(float(told["reported"]) - float(told["real"])) / MISREPORTED
    mine, other = record["used"], reference["used"]
    if fault.harm == "perplexity":
        nats = float(mine["perplexity"]) - float(other["perplexity"])
        return nats / NATS_LOST if isfinite(nats) else inf
    if fault.harm == "repetition":
        return (float(mine["repetition"]) - float(other["repetition"])) / LOOPS_MORE
    lost = (float(other["score"]) - float(mine["score"])) / SCORE_LOST
    sure = sign_test(other["right"], mine["right"]) < SIGNIFICANT
    return lost if sure else min(lost, 0.99)


def visible(record: Record) -> int | None:
    """The step at which the validation loss shows that something is wrong."""
    lowest = inf
    for row in record["log"]:
        if "eval_loss" not in row:
            continue
        loss = float(row["eval_loss"])
        if not isfinite(loss) or loss > VISIBLE * lowest:
            return int(row["step"])
        lowest = min(lowest, loss)
    return None


def rate(judged: Sequence[Judged]) -> tuple[int, int]:
    """How many of them failed, and how many there are."""
    return sum(one.failed for one in judged), len(judged)
