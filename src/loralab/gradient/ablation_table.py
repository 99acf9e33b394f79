"""An ablation's table: a row a variant, mean ± standard deviation over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from loralab.config import AblationConfig

TABLE = "ablation"
"""The table of a run so far: TABLE.json and TABLE.md."""

_COLUMNS: Mapping[str, tuple[str, float, int, str]] = {
    "held_out": ("held-out correct", 100, 1, " %"),
    "held_out_reward": ("held-out reward", 1, 4, ""),
    "answered": ("answered", 100, 0, " %"),
    "held_out_loss": ("held-out loss", 1, 4, ""),
    "loss": ("training loss", 1, 4, ""),
    "deviation": ("spline moved", 1, 4, ""),
    "outside": ("outside grid", 100, 1, " %"),
    "cpu_seconds": ("processor s", 1, 0, ""),
}
"""Title, factor, digits and unit of each number."""
_OF_SPLINES = ("deviation", "outside")


def table(config: AblationConfig, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plain values for JSON, of each variant that has a run: variant, says, seeds, failed, and by
    name of a column [mean, standard deviation] or None.

    rows: lines of the run's metrics.
    """
    made = []
    for variant in config.variants:
        mine = [row for row in rows if row.get("variant") == variant.name]
        good = [row for row in mine if "failed" not in row]
        if not mine:
            continue
        made.append(
            {
                "variant": variant.name,
                "says": variant.says,
                "seeds": len(mine),
                "failed": len(mine) - len(good),
                **{key: _mean_sd([_number(row, key) for row in good]) for key in _COLUMNS},
            }
        )
    return made


def header(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Titles of the columns: the reward where nothing is right or wrong, splines where some are."""
    return ["variant", "change", *(_COLUMNS[key][0] for key in _shown(rows))]


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table as text."""
    return [
        [
            row["variant"],
            row["says"] + (f" ({row['failed']} of {row['seeds']} failed)" if row["failed"] else ""),
            *(_cell(row[key], *_COLUMNS[key][1:]) for key in _shown(rows)),
        ]
        for row in rows
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as it stands in docs."""
    titles = header(rows)
    lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)], *cells(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    score = "held_out" if any(row["held_out"] for row in rows) else "held_out_reward"
    left_out = {"held_out", "held_out_reward"} - {score}
    if not any(row[key] for row in rows for key in _OF_SPLINES):
        left_out |= set(_OF_SPLINES)
    return [key for key in _COLUMNS if key not in left_out]


def _number(row: Mapping[str, Any], key: str) -> float | None:
    found = (row.get("spline") or {}).get(key) if key in _OF_SPLINES else row.get(key)
    return None if found is None else float(found)


def _mean_sd(values: Sequence[float | None]) -> tuple[float, float] | None:
    there = [value for value in values if value is not None]
    if not there:
        return None
    return fmean(there), stdev(there) if len(there) > 1 else 0.0


def _cell(pair: Sequence[float] | None, by: float, digits: int, unit: str) -> str:
    if pair is None:
        return "-"
    return f"{pair[0] * by:.{digits}f} ± {pair[1] * by:.{digits}f}{unit}"
