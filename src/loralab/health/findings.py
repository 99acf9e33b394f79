"""What was found wrong with a model, said in its own numbers, and how bad it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["warn", "fail"]
Verdict = Literal["sound", "suspect", "broken"]


@dataclass(frozen=True)
class Example:
    """One prompt with what the model wrote and what its base wrote."""

    prompt: str
    completion: str
    base: str


@dataclass(frozen=True)
class Finding:
    """A rule that did not hold.

    rule: its name, "text.repetition". step: of training; 0 for what a doctor found.
    message: one line that cites the numbers. cause: the likeliest, an id of `causes.CAUSES`; also:
    what else it may be, likelier first. advice: the mend, one or two lines.
    """

    rule: str
    severity: Severity
    step: int
    message: str
    numbers: Mapping[str, float]
    cause: str
    also: tuple[str, ...]
    advice: str
    examples: tuple[Example, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data that any reader of JSON takes; `from_json` undoes it exactly."""
        return asdict(self) | {
            "numbers": plain_numbers(self.numbers),
            "also": list(self.also),
            "examples": [asdict(example) for example in self.examples],
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Finding:
        """A finding from a line of findings.jsonl.

        Raises:
            KeyError: the line is not a finding.
        """
        return cls(
            rule=row["rule"],
            severity=row["severity"],
            step=row["step"],
            message=row["message"],
            numbers=numbers(row["numbers"]),
            cause=row["cause"],
            also=tuple(row["also"]),
            advice=row["advice"],
            examples=tuple(Example(**example) for example in row["examples"]),
        )


def verdict(findings: Iterable[Finding]) -> Verdict:
    """Where nothing was found "sound", with warnings alone "suspect", with a failure "broken"."""
    severities = {finding.severity for finding in findings}
    if "fail" in severities:
        return "broken"
    return "suspect" if severities else "sound"


def plain_numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """Numbers for JSON, which has neither NaN nor infinity: these become "nan", "inf", "-inf"."""
    return {
        name: float(value) if math.isfinite(value) else str(float(value))
        for name, value in values.items()
    }


def numbers(row: Mapping[str, float | str]) -> dict[str, float]:
    """What `plain_numbers` was given."""
    return {name: float(value) for name, value in row.items()}
