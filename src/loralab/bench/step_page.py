"""The page of a step benchmark, and what the command lines of all of them have in common."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from loralab.bench import curves
from loralab.bench.table import Cell, Section, Table
from loralab.bench.timing import Lap, machine, ratio, versions
from loralab.bench.work import Work
from loralab.bench.workers import Race, Say, Way, race
from loralab.errors import UserError


@dataclass(frozen=True)
class StepOptions:
    """What to measure: `laps` of each way, of `steps` steps after `warm` that are not measured.

    ways: by name; none are all. curve: steps of the comparison of losses, 0 for none. core: the
    one that everything runs on, the last if None.
    """

    ways: tuple[str, ...] = ()
    laps: int = 5
    steps: int = 2
    warm: int = 1
    curve: int = 0
    core: int | None = None

    @property
    def total(self) -> int:
        """Steps that a way takes in all."""
        return self.laps * (self.warm + self.steps)


def facts(core: int | None, **more: str) -> dict[str, str]:
    """Where and when it was measured, then what is given."""
    packages = versions("loralab", "torch", "transformers", "peft", "trl")
    return {
        "machine": machine(),
        "core": f"one ({core})" if core is not None else "one thread, not bound to a core",
        "versions": ", ".join(f"{name} {number}" for name, number in packages.items()),
        "date": date.today().isoformat(),
        **more,
    }


def laps(options: StepOptions) -> str:
    """How it was measured, in words."""
    return (
        f"ways take turns; {options.laps} laps of each, of {options.steps} steps after "
        f"{options.warm} that are not measured"
    )


def speed(race: Race, ways: Mapping[str, Way], references: Mapping[str, str]) -> Section:
    """Tokens per second and peak memory, beside those of the reference ways.

    references: name of a way -> what its columns call it.
    """
    there = {name: text for name, text in references.items() if name in race.peaks}
    rows: list[list[Cell]] = []
    for name, peak in race.peaks.items():
        timed = race.timed[name]
        slowest, fastest = timed.spread
        rows.append(
            [
                ways[name].label,
                timed.tokens_per_second,
                f"{slowest:.0f} to {fastest:.0f}",
                *(f"{ratio(race.timed[other], timed):.2f}" for other in there),
                f"{peak:.2f}",
                *(f"{peak / race.peaks[other]:.2f}" for other in there),
                f"{timed.core_share:.0%}",
            ]
        )
    columns = [
        *("way", "tokens/s", "slowest to fastest"),
        *(f"x {text}" for text in there.values()),
        "peak GB",
        *(f"of {text}'s" for text in there.values()),
        "core",
    ]
    notes = [
        "`tokens/s`: tokens through the model, padding left out, median of the laps by the clock. "
        "`x`: median over the rounds of the ratio of processor times. `peak GB`: highest resident "
        "memory (10^9 bytes) of the way's own process, libraries and loading included. `core`: "
        "share of the time in which the way had the core to itself.",
        *(f"{ways[name].label}: skipped, {reason}." for name, reason in race.skipped.items()),
    ]
    return Section("Speed and memory", "", columns, rows, notes)


@dataclass(frozen=True)
class Measured:
    """What came out: sections of the page, the data behind them, and the race if there was one."""

    sections: list[Section]
    data: dict[str, Any]
    race: Race | None


def measure(
    options: StepOptions,
    ways: Mapping[str, Way],
    work: Work,
    references: Mapping[str, str],
    compared: Sequence[str] = (),
    beside: Mapping[str, Callable[[], Lap]] | None = None,
    say: Say = lambda _: None,
) -> Measured:
    """Race the ways and compare their losses, as far as the options ask for it.

    references: as `speed` takes them. compared: ways whose losses are compared, with those of the
    first. beside: what takes turns with the ways.
    """
    sections: list[Section] = []
    data: dict[str, Any] = {"options": asdict(options)}
    done = None
    if options.laps:
        done = race(ways, work, options.laps, options.steps, options.warm, say, beside)
        sections.append(speed(done, ways, references))
        data["ways"] = {
            name: {
                "tokens_per_second": done.timed[name].tokens_per_second,
                "peak_gb": peak,
                "laps": [asdict(lap) for lap in done.laps(name)],
            }
            for name, peak in done.peaks.items()
        }
    there = {name: ways[name] for name in compared if name in ways}
    if options.curve and there:
        found = curves.measure(there, work, options.curve, say)
        sections.append(curves.section(found, there, next(iter(there))))
        data["losses"] = found.losses
    return Measured(sections, data, done)


def arguments(
    parser: argparse.ArgumentParser, ways: Mapping[str, Way], page: Path, curve: bool
) -> Any:
    """Add the options that every step benchmark has; gives `add_argument` for more."""
    add = parser.add_argument
    add("--quick", action="store_true", help="one short lap of each: does it all run?")
    add("--ways", nargs="+", metavar="NAME", help=f"of {', '.join(ways)}")
    add("--laps", type=int, help="of each way; 0: no speed")
    add("--steps", type=int, help="of a lap")
    add("--warm", type=int, help="steps before each lap that are not measured")
    if curve:
        add("--curve", type=int, metavar="STEPS", help="compare losses too; 0, the default: not")
    add("--core", type=int, help="default: the last one")
    add("--out", type=Path, help=f"page to write, default {page} (none with --quick or --json)")
    add("--json", type=Path, metavar="FILE", help="write the raw measurements here")
    return add


def main(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    page: Path,
    quick: Mapping[str, Any],
    run: Callable[[Mapping[str, Any], Callable[[str], None]], Table],
) -> int:
    """Run from the command line; 0 when measured, 2 for what the user can mend.

    run: gets the options that were given, and where to say how it goes.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # A plain kill must still end the workers.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    values = vars(parser.parse_args(given))
    is_quick, out, file = (values.pop(key) for key in ("quick", "out", "json"))
    chosen = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if value is not None
    }
    try:
        table = run(
            {**(quick if is_quick else {}), **chosen},
            lambda line: print(line, file=sys.stderr, flush=True),
        )
    except UserError as error:
        print(f"loralab bench: {error}", file=sys.stderr)
        return 2
    command = f"`{shlex.join([*parser.prog.split(), *given])}`"
    table = replace(table, facts={"command": command, **table.facts})
    print(table.markdown())
    if file is not None:
        file.write_text(json.dumps({**table.facts, **table.data}, indent=1) + "\n")
    if out is not None or not (is_quick or file):
        table.write(out or page)
    return 0
