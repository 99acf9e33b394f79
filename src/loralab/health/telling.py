"""Findings and looks in words, for a console and for a tracker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import indent

from loralab.health.findings import Example, Finding

SHOWN = 60
"""Characters of a text on a line."""


def lines(finding: Finding, unit: str = "step") -> Iterator[str]:
    """What is wrong; of a failure the likely cause, its mend and a text beside the base's.

    unit: what the finding's `step` counts.
    """
    mark = "FAIL" if finding.severity == "fail" else "warn"
    yield f"{mark} {unit} {finding.step} {finding.rule}: {finding.message}"
    if finding.severity == "fail":
        yield f"     likely {finding.cause}: {finding.advice}"
        for example in finding.examples[:1]:
            yield f"     asked {short(example.prompt)}"
            yield f"     it writes {short(example.completion)}"
            if example.base:
                yield f"     its base  {short(example.base)}"


def as_markdown(finding: Finding) -> str:
    """The whole finding with its texts."""
    severity = "fails" if finding.severity == "fail" else "warns"
    said = (
        f"**{finding.rule} {severity}** at step {finding.step}: {finding.message}\n\n"
        f"likely cause: {', '.join((finding.cause, *finding.also))}\n\n"
        f"advice: {finding.advice}"
    )
    return "\n\n".join([said, *filter(None, [texts_as_markdown(finding.examples)])])


def texts_as_markdown(examples: Sequence[Example]) -> str:
    """Each prompt, what the model wrote to it, and what its base did."""
    return "\n\n".join(
        f"**prompt**\n\n{_quoted(one.prompt)}\n\nwrites\n\n{_quoted(one.completion)}"
        + (f"\n\nits base\n\n{_quoted(one.base)}" if one.base else "")
        for one in examples
    )


def short(text: str) -> str:
    """A text on a line, line breaks visible."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def _quoted(text: str) -> str:
    """Markdown as it stands, line breaks and all."""
    return indent(text or "(nothing)", "    ")
