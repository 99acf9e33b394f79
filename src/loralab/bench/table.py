"""A measured table: Markdown for the docs, JSON beside it, written together.

On a page the measured part stands between two marks (`BEGIN`, `END`). What people wrote before and
after it is theirs: a table that is written again leaves it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab import durable
from loralab.errors import UserError

Cell = str | float | int | None

BEGIN = "<!-- measured: the command writes this part anew, and keeps what stands around it -->"
END = "<!-- end of what is measured -->"


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
        table = "\n".join(self._table()) if self.rows else ""
        parts = [f"## {self.heading}", self.intro, table, *self.notes]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _table(self) -> list[str]:
        numeric = [
            all(not isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))
        ]
        lines = ["| " + " | ".join(self.columns) + " |"]
        lines.append("| " + " | ".join("---:" if n else "---" for n in numeric) + " |")
        return lines + ["| " + " | ".join(map(_text, row)) + " |" for row in self.rows]


@dataclass(frozen=True)
class Table:
    """A page of sections, how it was made, and the raw measurements behind it.

    files: what lies beside the page, by name.
    """

    title: str
    facts: Mapping[str, str]
    sections: Sequence[Section]
    data: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def markdown(self) -> str:
        """The whole page, as one writes it for the first time."""
        return f"# {self.title}\n\n{self.measured()}"

    def measured(self) -> str:
        """Facts and sections, without the title."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        return "\n".join([f"{facts}\n", *(section.markdown() for section in self.sections)])

    def raw(self) -> str:
        """Facts and measurements as JSON."""
        data = {"title": self.title, "facts": dict(self.facts), **self.data}
        return json.dumps(data, indent=1) + "\n"

    def write(self, page: Path) -> None:
        """Write the measured part of a page, and beside it its files and the same name with .json.

        A page without marks, as one that was written by hand, keeps its text and gets the measured
        part at its end.

        Raises:
            UserError: the page's marks are not a pair, or it cannot be written.
        """
        before, after = around(page)
        before = before or f"# {self.title}\n\n"
        durable.write_whole(page.with_suffix(".json"), self.raw())
        for name, content in self.files.items():
            durable.write_whole(page.with_name(name), content)
        durable.write_whole(page, f"{before}{BEGIN}\n\n{self.measured()}\n{END}\n{after}")


def around(page: Path) -> tuple[str, str]:
    """What a page holds before and after its measured part; empty where there is no page.

    Raises:
        UserError: its marks are not one pair.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    marks = text.count(BEGIN), text.count(END)
    if marks == (0, 0):
        return (f"{text.rstrip()}\n\n" if text.strip() else ""), ""
    before, _, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if marks != (1, 1) or not ended:
        raise UserError(
            f"{page}: the marks around the measured part are {marks[0]} and {marks[1]}; expected "
            f"one pair, {BEGIN!r} before {END!r}: mend or remove them"
        )
    return before, after.removeprefix("\n")


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell).replace("|", "\\|")
