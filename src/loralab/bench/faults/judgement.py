"""What records of runs mean: harmful or not, who noticed, when, and what they took it for.

Nothing is run here: rules and limits may change, and the same runs are judged again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import inf, isfinite
from typing import Any

from loralab.bench.faults.healthy import SETUPS
from loralab.bench.faults.plan import Fault, Plan
from loralab.bench.faults.statistics import sign_test
from loralab.health.findings import Finding, Severity
from loralab.health.reading import Reading
from loralab.health.rule import Rule
from loralab.health.rules import causes, judge

Record = Mapping[str, Any]
Rules = Sequence[Rule]
Log = Sequence[Mapping[str, Any]]

SCORE_LOST, SIGNIFICANT = 0.15, 0.05
NATS_LOST = 0.2
LOOPS_MORE = 0.2
MISREPORTED = 0.1
"""What counts as worse than the same run without the fault: right answers (and the exact test of
the pairs), nats a token on held-out stories, answers that loop; or, of a broken evaluation, the
reported gain off the real one."""

VISIBLE = 1.1
"""The validation loss shows a harm once it is so many times its own lowest or that of the run
without the fault at the same step, or no number."""

_AFTERWARDS = {"on_saved", "around", "score", "prompt", "baseline_off"}
"""Of a plan, what touches nothing before the training is over (`around`: the merge)."""


@dataclass(frozen=True)
class Judged:
    """One run of a fault or a healthy one.

    harmful: None of a healthy run, or without the run to compare with. worse: by how much, in the
    unit of the harm. seen, told: findings of the guard and of the doctor. early: those of the guard
    before the fault came in, which are of something else, and in `seen` no more. injected: the step
    at which the fault came in; None of one that came after the training, and of a healthy run.
    shown: the step at which the validation loss shows it. named: the right cause is among the first
    two. peers: opinions of those that can judge such a run at all.
    """

    record: Record
    harmful: bool | None
    worse: float
    seen: tuple[Finding, ...] = ()
    told: tuple[Finding, ...] = ()
    early: tuple[Finding, ...] = ()
    injected: int | None = None
    shown: int | None = None
    named: bool = False
    peers: Mapping[str, str] = field(default_factory=dict)

    @property
    def guard(self) -> Severity | None:
        return _worst(self.seen)

    @property
    def doctor(self) -> Severity | None:
        return _worst(self.told)

    @property
    def failed(self) -> bool:
        return "fail" in (self.guard, self.doctor)

    @property
    def warned(self) -> bool:
        """Warned of, and not failed."""
        return not self.failed and bool(self.seen or self.told)

    @property
    def by(self) -> str:
        """Who failed it first."""
        if not self.failed:
            return ""
        return "guard" if self.guard == "fail" else "doctor"

    @property
    def step(self) -> int | None:
        """Of the first FAIL; the doctor comes after the last."""
        if not self.failed:
            return None
        return min((f.step for f in self.seen if f.severity == "fail"), default=self.steps)

    @property
    def steps(self) -> int:
        return int(self.record["steps"])

    @property
    def delay(self) -> int | None:
        """Steps from the injection to the first FAIL."""
        if self.step is None or self.injected is None:
            return None
        return self.step - self.injected

    @property
    def has_validation(self) -> bool:
        """Whether the fault was there in a training whose validation loss might show it."""
        log = self.record.get("log", ())
        return self.injected is not None and any("eval_loss" in row for row in log)

    @property
    def lead(self) -> int | None:
        """Steps from the first FAIL to where the validation loss shows it; to the end where it
        never does, and so at least that many."""
        if self.step is None or not self.has_validation:
            return None
        return (self.steps if self.shown is None else self.shown) - self.step

    @property
    def before_the_loss(self) -> bool:
        """FAIL came before the validation loss showed it, if it ever did."""
        return self.step is not None and (self.shown is None or self.step < self.shown)

    @property
    def causes(self) -> tuple[str, ...]:
        """The likeliest two."""
        return causes((*self.seen, *self.told))[:2]

    @property
    def rules(self) -> tuple[str, ...]:
        """That failed or, where none did, that warned."""
        both = (*self.seen, *self.told)
        kept = (one.rule for one in both if one.severity == "fail" or not self.failed)
        return tuple(dict.fromkeys(kept))


def judged(
    record: Record,
    fault: Fault | None,
    reference: Record | None,
    peers: Mapping[str, Callable[[Log], str]],
    rules: Rules | None = None,
) -> Judged:
    """One record. reference: the same run without the fault, of the same seed. rules: None takes
    all of today. A run of a fault that broke off counts as harmful, and as missed."""
    if "error" in record:
        return Judged(record, None if fault is None else True, inf)
    seen, told = guard_findings(record, rules), doctor_findings(record, rules)
    early: list[Finding] = []
    came_in = None if fault is None else injected(fault, int(record["steps"]))
    if fault is not None:
        first = inf if came_in is None else came_in
        early = [one for one in seen if one.step < first]
        seen = [one for one in seen if one.step >= first]
    harmless = fault is None or reference is None
    worse = inf if fault is None or reference is None else harm(fault, record, reference)
    named = fault is not None and bool(set(fault.causes) & set(causes((*seen, *told))[:2]))
    return Judged(
        record=record,
        harmful=None if harmless else worse >= 1,
        worse=worse,
        seen=tuple(seen),
        told=tuple(told),
        early=tuple(early),
        injected=came_in,
        shown=visible(record, reference),
        named=named,
        # A search has no training loss, and so no log that such a judge reads.
        peers={}
        if "generations" in record
        else {name: opinion(record["log"]) for name, opinion in peers.items()},
    )


def guard_readings(record: Record) -> list[list[Reading]]:
    """Each list that the guard judged anew with every reading it got; of a search, its texts, and
    each generation's numbers on their own."""
    if "error" in record:
        return []
    looked = [Reading.from_json(row) for row in record["readings"]]
    return [looked, *([Reading.from_json(row)] for row in record.get("numbers", ()))]


def doctor_readings(record: Record) -> list[Reading]:
    """Each judged on its own."""
    if "error" in record:
        return []
    return [Reading.from_json(row) for row in record["doctor"]["readings"]]


def guard_findings(record: Record, rules: Rules | None = None) -> list[Finding]:
    """As the guard's rules of today judge what it measured."""
    looked, *generations = guard_readings(record)
    found = _fresh([looked[:upto] for upto in range(1, len(looked) + 1)], rules)
    found += _fresh(generations, rules)
    if not generations:
        # A step without a look is judged at once where its numbers are not finite.
        known = {reading.step for reading in looked}
        said = [Finding.from_json(row) for row in record["findings"]]
        found += [one for one in said if one.step not in known]
    return sorted(found, key=lambda one: one.step)


def _fresh(looks: Sequence[Sequence[Reading]], rules: Rules | None) -> list[Finding]:
    """Findings as they come; one that stands is told once."""
    found: list[Finding] = []
    standing: set[tuple[str, str]] = set()
    for readings in looks:
        now = judge(readings, rules)
        found += [one for one in now if (one.rule, one.severity) not in standing]
        standing = {(one.rule, one.severity) for one in now}
    return found


def doctor_findings(record: Record, rules: Rules | None = None) -> list[Finding]:
    """As the rules of today judge what the doctor measured; of files what it said then."""
    found = [one for reading in doctor_readings(record) for one in judge([reading], rules)]
    known = {one.rule for one in found}
    said = [Finding.from_json(row) for row in record["doctor"]["findings"]]
    return found + [one for one in said if not _of_a_reading(one) and one.rule not in known]


def _of_a_reading(finding: Finding) -> bool:
    """A rule cites its limits; who reads files has none. Both may use the same rule's name."""
    return any(name.startswith("limit.") for name in finding.numbers)


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


def injected(fault: Fault, steps: int) -> int | None:
    """The step at which it comes in, 0 before the first; None of one that comes after the training.

    steps: of the run.
    """
    plan = Plan()
    SETUPS[fault.setup](plan)
    plan.steps = steps
    broken = copy.deepcopy(plan)
    fault.change(broken)
    names = [one.name for one in fields(Plan)]
    changed = {name for name in names if getattr(plan, name) != getattr(broken, name)}
    if plan.search is None and changed <= _AFTERWARDS:
        return None
    return broken.poisoned or 0


def visible(record: Record, reference: Record | None = None) -> int | None:
    """The step at which the validation loss shows that something is wrong."""
    beside = {} if reference is None else dict(_validation(reference))
    lowest = inf
    for step, loss in _validation(record):
        if not isfinite(loss) or loss > VISIBLE * min(lowest, beside.get(step, inf)):
            return step
        lowest = min(lowest, loss)
    return None


def _validation(record: Record) -> list[tuple[int, float]]:
    rows = [row for row in record.get("log", ()) if "eval_loss" in row]
    return [(int(row["step"]), float(row["eval_loss"])) for row in rows]


def _worst(findings: Sequence[Finding]) -> Severity | None:
    if any(one.severity == "fail" for one in findings):
        return "fail"
    return "warn" if findings else None
