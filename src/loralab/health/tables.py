"""The rules, their limits and the causes as Markdown, for docs/health.md.

python -m loralab.health.tables docs/health.md       writes them between their marks
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from loralab.health import thresholds
from loralab.health.causes import CAUSES, MENDS
from loralab.health.condition import Condition
from loralab.health.rule import Rule
from loralab.health.rules import RULES


def rules_table() -> str:
    """One line a rule."""
    return _table(
        ("rule", "fails when", "warns when", "how long", "likely cause", "evidence"),
        (
            (
                f"`{rule.name}`",
                _all(rule.fail),
                _all(rule.warn),
                _when(rule),
                ", ".join(f"`{cause}`" for cause in (rule.cause, *rule.also)),
                rule.evidence,
            )
            for rule in RULES
        ),
    )


def limits_table() -> str:
    """Every limit with where it comes from."""
    return _table(
        ("limit", "value", "healthy, at worst", "evidence"),
        (
            (f"`{name}`", f"{limit.value:g}", _known(limit.healthy), limit.evidence)
            for name, limit in vars(thresholds).items()
            if isinstance(limit, thresholds.Limit)
        ),
    )


def causes_table() -> str:
    """Every cause with its mend."""
    return _table(
        ("cause", "what it is", "mend"),
        ((f"`{cause}`", text, MENDS[cause]) for cause, text in CAUSES.items()),
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "rules": rules_table,
    "limits": limits_table,
    "causes": causes_table,
}


def filled(page: str) -> str:
    """The page with each table anew between its marks, "<!-- rules -->" and "<!-- /rules -->"."""
    for name, make in TABLES.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = page.split(opening)
        page = f"{before}{opening}{make()}{closing}{rest.split(closing)[1]}"
    return page


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _all(conditions: tuple[Condition, ...]) -> str:
    return " and ".join(f"`{one.value}` {one.bound()}" for one in conditions) or "-"


def _when(rule: Rule) -> str:
    parts = [] if len(rule.moments) == 3 else [", ".join(rule.moments)]
    parts += [f"from step {rule.since}"] if rule.since else []
    parts += [f"{rule.lasting} looks in a row to fail"] if rule.lasting > 1 else []
    return "; ".join(parts) or "any look"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines
    )


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.write_text(filled(place.read_text(encoding="utf-8")), encoding="utf-8")
