"""A page of tables: of runs whose outcome is one, and has no course to draw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loralab import durable
from loralab.errors import UserError
from loralab.report import text
from loralab.report.template import PAGE, render
from loralab.run import Run


@dataclass(frozen=True)
class Table:
    """rows: as text. links: what each row's first cell leads to, none at all or one a row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    links: Sequence[str | None] = ()


def write_tables(run: Run, notices: Sequence[str], tables: Sequence[Table]) -> Path:
    """Write `report.html` with the tables that have a row.

    Raises:
        UserError: the directory cannot be written.
    """
    page = render(
        "tables.html.j2",
        name=str(run.config.get("name") or run.path.resolve().name),
        subtitle=text.subtitle(run.config),
        notices=notices,
        tables=[table for table in tables if table.rows],
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
    )
    target = run.path / PAGE
    durable.write_whole(target, page)
    return target


def read_json(run: Run, name: str) -> Any:
    """What a file of the run holds; None where it is not there yet.

    Raises:
        UserError: it is damaged.
    """
    path = run.path / name
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); run it again") from error
