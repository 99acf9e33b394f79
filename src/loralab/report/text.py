"""Numbers, durations and model text as a reader wants to see them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"
LONGEST = 4000
"""Characters of one completion or prompt that the page shows."""

_NEWLINES = re.compile(r"\n{4,}")


def is_number(value: object) -> bool:
    """Whether `value` is a finite number (a bool is not one)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: object) -> str:
    """About four significant digits with a true minus sign; what is no number is named."""
    if value is None:
        return MISSING
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if not math.isfinite(value):
        return str(value).replace("nan", "NaN").replace("-", "−")
    size = abs(value)
    if size >= 1000 or value == int(value):
        shown = f"{value:,.0f}"
    elif size >= 100:
        shown = f"{value:.1f}"
    elif size >= 1:
        shown = f"{value:.2f}"
    else:
        shown = f"{value:.3g}"
    return shown.replace("-", "−")


def change(before: object, after: object) -> str:
    """Two numbers as "before → after", with the same decimals, so that they compare at a glance."""
    if not (is_number(before) and is_number(after)):
        return (
            MISSING if before is None and after is None else f"{number(before)} → {number(after)}"
        )
    first, second = float(before), float(after)  # type: ignore[arg-type]
    size = max(abs(first), abs(second))
    if size < 1:
        return f"{number(first)} → {number(second)}"
    decimals = 0 if size >= 1000 else 1 if size >= 100 else 2
    return f"{first:,.{decimals}f} → {second:,.{decimals}f}".replace("-", "−")


def share(value: object) -> str:
    """A share from 0 to 1 as a percentage."""
    if not is_number(value):
        return MISSING
    percent = 100 * float(value)  # type: ignore[arg-type]
    return f"{percent:.0f} %" if percent >= 10 or percent in (0.0, 1.0) else f"{percent:.1f} %"


def duration(seconds: object) -> str:
    """Seconds as "0.08 s", "45.2 s", "3 min 12 s" or "2 h 05 min"."""
    if not is_number(seconds):
        return MISSING
    value = float(seconds)  # type: ignore[arg-type]
    if value < 0.0005:
        return "0 s"
    if value < 1:
        return f"{value:.2g} s" if value >= 0.01 else f"{1000 * value:.2g} ms"
    if value < 99.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def prompt_text(prompt: object) -> str:
    """A prompt as text: messages one after the other, each under its role."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        turns = [turn for turn in prompt if isinstance(turn, Mapping)]
        if len(turns) == 1:
            return str(turns[0].get("content", ""))
        return "\n\n".join(f"{turn.get('role', '?')}: {turn.get('content', '')}" for turn in turns)
    return "" if prompt is None else str(prompt)


def visible(value: Any, longest: int = LONGEST) -> str:
    """Model text with what would not be seen made visible.

    Runs of four or more newlines are counted; control, direction-changing and other formatting
    characters and lone surrogates become escapes such as `\\u202e`; long text is cut, saying so.
    """
    text = str(value)
    rest = len(text) - longest
    text = text[:longest].replace("\r\n", "\n")
    text = _NEWLINES.sub(lambda run: f"\n⏎ × {len(run.group())}\n", text)
    text = "".join(_escape(character) for character in text)
    return f"{text}\n… {rest:,} more characters" if rest > 0 else text


def _escape(character: str) -> str:
    # Joiners (Cf) inside emoji and Indic scripts are legitimate text.
    if character in "\n\t\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    return character.encode("unicode_escape").decode("ascii")


def subtitle(config: Mapping[str, Any]) -> str:
    """What a run is about: kind, model, task, dtype and seed, as far as its config has them."""
    task = config.get("task")
    name = task.get("name") if isinstance(task, Mapping) else task
    parts = [config.get("kind"), config.get("model"), name, config.get("dtype")]
    seed = config.get("seed")
    return " · ".join(
        [str(part) for part in parts if part] + ([f"seed {seed}"] * (seed is not None))
    )


def phrase(value: Any) -> str:
    """Plain nested values in a line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {phrase(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(phrase(part) for part in value)
    return MISSING if value is None else str(value)
