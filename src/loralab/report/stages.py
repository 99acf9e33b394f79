"""A pipeline's table, as Markdown and as a page that links to each stage's own report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab import durable
from loralab.errors import UserError
from loralab.report.tables import Table, read_json, write_tables
from loralab.report.template import PAGE
from loralab.report.text import MISSING, is_number, number, share
from loralab.run import Run

TABLE = "table"
"""The table of a pipeline's run: TABLE.json and TABLE.md, of the stages that are done."""


def build_stages_page(run: Run) -> Path:
    """Write `report.html` of a pipeline, from its table and its journal.

    Raises:
        UserError: the run is damaged, or the directory cannot be written.
    """
    table = read_table(run) or {
        "columns": [], "rows": [], "unfinished": list(run.config["stages"])
    }  # fmt: skip
    begun = {row["directory"]: row for row in durable.read_lines(run.journal_path)}
    stages = Table(
        "Stages",
        header(table),
        [cells(row, table["columns"]) for row in table["rows"]],
        [_link(run, row["directory"]) for row in table["rows"]],
    )
    directories = Table(
        "Run directories",
        ["directory", "stage", "state"],
        [
            [name, row["stage"], "done" if row["event"] == "finished" else "begun, not finished"]
            for name, row in begun.items()
        ],
        [_link(run, name) for name in begun],
    )
    left = table["unfinished"]
    return write_tables(
        run, [f"Unfinished: {', '.join(left)}."] if left else [], [stages, directories]
    )


def read_table(run: Run) -> dict[str, Any] | None:
    """What `table.json` holds; None before the first stage is done.

    Raises:
        UserError: it is damaged.
    """
    table = read_json(run, f"{TABLE}.json")
    if table is not None and not isinstance(table, dict):
        raise UserError(f"{run.path / TABLE}.json: is damaged; run it again")
    return table


def header(table: Mapping[str, Any]) -> list[str]:
    """Titles of the columns."""
    return ["stage", "kind", "parameters", "trained", *table["columns"], "its own report"]


def cells(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """A row of the table as text."""
    named = str(row["stage"])
    if row.get("model") not in (None, named):
        named += f" ({row['model']})"
    return [
        named,
        str(row["kind"]),
        millions(row.get("parameters")),
        millions(row.get("trained")),
        *[measured(row["measures"].get(column)) for column in columns],
        row.get("result") or MISSING,
    ]


def markdown(table: Mapping[str, Any]) -> str:
    """The table as it stands in documents."""
    titles = header(table)
    aligned = ["---", "---", *["---:"] * (len(titles) - 3), "---"]
    lines = [titles, aligned, *(cells(row, table["columns"]) for row in table["rows"])]
    return "".join(f"| {' | '.join(_one_line(cell) for cell in line)} |\n" for line in lines)


def measured(found: Mapping[str, Any] | None) -> str:
    """What an evaluation gave, in a cell: perplexity, or share correct, else reward."""
    if found is None:
        return MISSING
    if "perplexity" in found:
        return number(found["perplexity"])
    right = found.get("correct")
    said = [f"reward {number(found['reward'])}" if right is None else share(right)]
    if is_number(found.get("f1")):
        said.append(f"F1 {number(found['f1'])}")
    return ", ".join(said)


def millions(count: object) -> str:
    """A number of parameters."""
    if not is_number(count):
        return MISSING
    value = float(count)  # type: ignore[arg-type]
    return f"{value / 1e6:,.2f} M" if value >= 1e5 else f"{value:,.0f}"


def _one_line(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _link(run: Run, directory: str | None) -> str | None:
    if directory is None or not (run.path / directory / PAGE).exists():
        return None
    return f"{directory}/{PAGE}"
