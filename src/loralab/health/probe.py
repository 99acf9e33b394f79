"""What a probe is, and a reading made of several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from loralab.health.findings import Example
from loralab.health.reading import Reading
from loralab.health.text import badness

if TYPE_CHECKING:
    from loralab.health.look import Look

SHOWN = 2
"""Examples that a reading shows of the worst texts, and as many of the same prompts each time."""


class Probe(Protocol):
    """Reads numbers off a look; the base's counterpart of "x" is "base.x"."""

    name: str

    def measure(self, look: Look) -> dict[str, float]:
        """Flat names to values; NaN where one could not be measured."""
        ...


def measure(look: Look, probes: Sequence[Probe], step: int) -> Reading:
    """Every probe's values in one reading, with examples: the worst texts, then the same prompts
    each time."""
    began = time.perf_counter()
    values: dict[str, float] = {}
    for probe in probes:
        values.update(probe.measure(look))
    examples = _examples(look)
    return Reading(step, values, examples, time.perf_counter() - began)


def _examples(look: Look) -> tuple[Example, ...]:
    """() where no probe asked for text."""
    if "completions" not in vars(look):
        return ()
    answers, base = look.answers(), look.base_answers()
    bad = [
        badness(answer) - (badness(base[index]) if base else 0.0)
        for index, answer in enumerate(answers)
    ]
    worst = sorted(range(len(answers)), key=lambda index: -bad[index])[:SHOWN]
    chosen = [*worst, *(i for i in range(min(SHOWN, len(answers))) if i not in worst)]
    return tuple(
        Example(answers[i].prompt, answers[i].text, base[i].text if base else "") for i in chosen
    )
