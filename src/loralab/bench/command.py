"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab import durable
from loralab.bench.table import Table, around
from loralab.bench.timing import machine, versions
from loralab.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Say = Callable[[str], None]
"""Tells whoever watches how it goes."""

Given = Mapping[str, Any]
"""Options that were given, by name; lists as tuples."""


def main(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    page: Path,
    run: Callable[[Given, Say], Table],
    quick: Given | None = None,
    peak: Callable[[str, Given], float] | None = None,
) -> int:
    """Run from the command line; 0 when measured, 2 for what the user can mend.

    page: written unless `--out` names another; not with `--quick` or `--json`. quick: options in
    the place of those not given with `--quick`. peak: for `--peak-of ROW`, which a benchmark asks
    of a process of its own (`timing.peak_in_child`).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # A plain kill must still end workers and remove memory-backed files.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    values = vars(parser.parse_args(given))
    is_quick, out, file, row = (values.pop(k, None) for k in ("quick", "out", "json", "peak_of"))
    chosen = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if value is not None
    }
    if is_quick and quick is not None:
        chosen = {**quick, **chosen}
    place: Path | None = out or (None if is_quick or file else page)
    try:
        if row is not None:
            assert peak is not None
            print(json.dumps({"peak_gb": peak(row, chosen)}))
            return 0
        if place is not None:
            around(place)  # Marks that are no pair are said before hours of measuring.
        table = run(chosen, lambda line: print(line, file=sys.stderr, flush=True))
        command = f"`{shlex.join([*parser.prog.split(), *map(told, given)])}`"
        table = replace(table, facts={"command": command, **table.facts})
        print(table.markdown())
        if file is not None:
            raw = json.dumps({**table.facts, **table.data}, indent=1)
            durable.write_whole(file, raw + "\n")
        if place is not None:
            table.write(place)
    except UserError as error:
        print(f"loralab bench: {error}", file=sys.stderr)
        return 2
    return 0


def facts(*packages: str, **more: str) -> dict[str, str]:
    """Where, with which versions and when it is measured, then what is given."""
    return {
        "machine": machine(),
        "versions": in_words(versions(*packages)),
        "date": date.today().isoformat(),
        **more,
    }


def bound(core: int | None) -> str:
    """What `timing.pin` gave, in words."""
    return f"one ({core})" if core is not None else "one thread, not bound to a core"


def in_words(numbers: Mapping[str, str]) -> str:
    """Versions by package, on a line."""
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def told(word: str) -> str:
    """A word of a command as a page may show it: of an absolute path the last part alone."""
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{Path(value).name or value}" if value.startswith("/") else word


def asked(options: DataclassInstance) -> dict[str, Any]:
    """Options as a page's JSON may hold them."""
    return {
        key: told(str(value)) if isinstance(value, str | Path) else value
        for key, value in asdict(options).items()
    }


def check_counts(options: DataclassInstance, zero: Sequence[str] = ()) -> None:
    """See that every whole number among options is 1 or more; 0 or more for those in `zero`.

    Raises:
        UserError: one is not.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        least = 0 if field.name in ("core", "seed", *zero) else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            name = field.name.replace("_", "-")
            raise UserError(f"--{name} is {value}; expected {least} or more")
