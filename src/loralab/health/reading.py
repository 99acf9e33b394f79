"""What the probes measured at one moment: flat names and numbers, and texts to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loralab.health.findings import Example, numbers, plain_numbers


@dataclass(frozen=True)
class Reading:
    """values: by flat name ("text.repetition4"; the base's counterpart is "base.text.repetition4"),
    NaN where a value could not be measured. examples: texts beside the base's, the same prompts at
    each reading. seconds: what measuring took.
    """

    step: int
    values: Mapping[str, float]
    examples: tuple[Example, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data that any reader of JSON takes; `from_json` undoes it exactly."""
        return {
            "step": self.step,
            "values": plain_numbers(self.values),
            "examples": [asdict(example) for example in self.examples],
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Reading:
        """A reading from a line of readings.jsonl.

        Raises:
            KeyError: the line is not a reading.
        """
        return cls(
            step=row["step"],
            values=numbers(row["values"]),
            examples=tuple(Example(**example) for example in row["examples"]),
            seconds=row["seconds"],
        )


Readings = Sequence[Reading]
"""Oldest first; the first is of step 0, before training, where there is one."""
