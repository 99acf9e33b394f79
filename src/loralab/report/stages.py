"""A pipeline's table, as Markdown and as a page that links to each stage's own report."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from loralab import durable
from loralab.errors import UserError
from loralab.report.text import MISSING, is_number, number, share
from loralab.run import Run

TABLE = "table"
"""The table of a pipeline's run: TABLE.json and TABLE.md, of the stages that are done."""

_HERE = Path(__file__).parent
_PAGE = "report.html"


def build_stages_page(run: Run) -> Path:
    """Write `report.html` of a pipeline, from its table and its journal.

    Raises:
        UserError: the run is damaged, or the directory cannot be written.
    """
    table = read_table(run)
    begun = {row["directory"]: row for row in durable.read_lines(run.journal_path)}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("stages.html.j2").render(
        name=str(run.config.get("name")),
        unfinished=list(run.config["stages"]) if table is None else table["unfinished"],
        header=[] if table is None else header(table),
        rows=[] if table is None else [
            {"cells": cells(row, table["columns"]), "link": _link(run, row["directory"])}
            for row in table["rows"]
        ],
        directories=[
            {
                "name": name,
                "stage": row["stage"],
                "state": "done" if row["event"] == "finished" else "begun, not finished",
                "link": _link(run, name),
            }
            for name, row in begun.items()
        ],
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    target = run.path / _PAGE
    durable.write_whole(target, page)
    return target


def read_table(run: Run) -> dict[str, Any] | None:
    """What `table.json` holds; None before the first stage is done.

    Raises:
        UserError: it is damaged.
    """
    path = run.path / f"{TABLE}.json"
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); run the pipeline again") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: is damaged; run the pipeline again")
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
        _millions(row.get("parameters")),
        _millions(row.get("trained")),
        *[_measured(row["measures"].get(column)) for column in columns],
        row.get("result") or MISSING,
    ]


def markdown(table: Mapping[str, Any]) -> str:
    """The table as it stands in documents."""
    titles = header(table)
    aligned = ["---", "---", *["---:"] * (len(titles) - 3), "---"]
    lines = [titles, aligned, *(cells(row, table["columns"]) for row in table["rows"])]
    return "".join(f"| {' | '.join(_one_line(cell) for cell in line)} |\n" for line in lines)


def _measured(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return MISSING
    if "perplexity" in found:
        return number(found["perplexity"])
    said = [f"reward {number(found['reward'])}"] if found.get("correct") is None else []
    if found.get("correct") is not None:
        said.append(share(found["correct"]))
    if is_number(found.get("f1")):
        said.append(f"F1 {number(found['f1'])}")
    return ", ".join(said)


def _millions(count: object) -> str:
    if not is_number(count):
        return MISSING
    value = float(count)  # type: ignore[arg-type]
    return f"{value / 1e6:,.2f} M" if value >= 1e5 else f"{value:,.0f}"


def _one_line(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _link(run: Run, directory: str | None) -> str | None:
    if directory is None or not (run.path / directory / _PAGE).exists():
        return None
    return f"{directory}/{_PAGE}"
