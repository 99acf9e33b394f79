"""The page's templates filled in: everything a model or a config wrote is text there (autoescape).

The pages' Content-Security-Policy forbids scripts and fetching, so that even a mistake here could
not run model text.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from loralab.report import text

PAGE = "report.html"

_HERE = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """The page of a template of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=text.number,
        share=text.share,
        duration=text.duration,
        visible=text.visible,
        prompt=text.prompt_text,
        phrase=text.phrase,
    )
    return environment.get_template(template).render(
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )
