"""A measured table: Markdown for the docs, JSON beside it, written together."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cell = str | float | int | None


@dataclass(frozen=True)
class Section:
    """One table under a heading; `notes` are paragraphs after it."""

    heading: str
    intro: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The section; numbers right-aligned, None as a dash."""
        lines = [f"## {self.heading}", "", self.intro]
        if self.rows:
            lines += ["", *self._table()]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def _table(self) -> list[str]:
        numeric = [
            all(not isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))
        ]
        lines = ["| " + " | ".join(self.columns) + " |"]
        lines.append("| " + " | ".join("---:" if n else "---" for n in numeric) + " |")
        return lines + ["| " + " | ".join(map(_text, row)) + " |" for row in self.rows]


@dataclass(frozen=True)
class Table:
    """A page of sections, how it was made, and the raw measurements behind it."""

    title: str
    facts: Mapping[str, str]
    sections: Sequence[Section]
    data: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """The whole page."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        sections = "\n".join(section.markdown() for section in self.sections)
        return f"# {self.title}\n\n{facts}\n\n{sections}"

    def write(self, page: Path) -> None:
        """Write the page and, beside it, the same name with .json. Both appear whole."""
        page.parent.mkdir(parents=True, exist_ok=True)
        data = {"title": self.title, "facts": dict(self.facts), **self.data}
        for path, text in (
            (page, self.markdown()),
            (page.with_suffix(".json"), json.dumps(data, indent=1) + "\n"),
        ):
            part = path.with_name(path.name + ".part")
            part.write_text(text)
            os.replace(part, path)


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell).replace("|", "\\|")
