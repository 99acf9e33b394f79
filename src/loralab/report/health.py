"""What was found wrong with a run, and the text at each look in order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def finding_view(row: Row) -> dict[str, Any]:
    """`fields`: words to show with their values, in order. `examples`: texts beside the base's.

    Findings of the health rules say what, why and advice in fields of their own; others are shown
    as they are.
    """
    if "severity" not in row:
        return {"tone": "", "fields": list(row.items()), "examples": []}
    causes = [row.get("cause"), *row.get("also", ())]
    fields = [
        ("fails" if row["severity"] == "fail" else "warns", row.get("rule")),
        ("step", row.get("step")),
        ("what", row.get("message")),
        ("likely cause", ", ".join(str(cause) for cause in causes if cause)),
        ("advice", row.get("advice")),
    ]
    return {
        "tone": "bad" if row["severity"] == "fail" else "",
        "fields": fields,
        "examples": [one for one in row.get("examples", ()) if isinstance(one, Mapping)],
    }


def texts_by_look(readings: Sequence[Row]) -> list[dict[str, Any]]:
    """The prompts that were shown at most looks, each with its base's text and, by step, its own.

    A reading shows its worst texts too, whose prompts change from look to look; one that came up
    once tells nothing of time and is left to the findings.
    """
    seen: dict[str, list[tuple[Any, Row]]] = defaultdict(list)
    for reading in readings:
        for one in reading.get("examples", ()):
            seen[one["prompt"]].append((reading["step"], one))
    most = max((len(rows) for rows in seen.values()), default=0)
    return [
        {
            "prompt": prompt,
            "base": rows[0][1]["base"],
            "rows": [{"step": step, "completion": one["completion"]} for step, one in rows],
        }
        for prompt, rows in seen.items()
        if len(rows) == most
    ]
