"""What the step benchmarks have in common: options, the race, the page, the command line.

A benchmark of a kind of training is a `Bench`: the ways it compares, and how the work they are
given is prepared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import torch

from loralab.bench import command, curves
from loralab.bench.command import Say, asked, bound, told
from loralab.bench.table import Cell, Section, Table
from loralab.bench.timing import Lap, pin, ratio
from loralab.bench.work import Work
from loralab.bench.workers import Race, Way, chosen, race
from loralab.errors import UserError


@dataclass(frozen=True)
class StepOptions:
    """What to measure: `laps` of each way, of `steps` steps after `warm` that are not measured.

    ways: by name; none are all. curve: steps of the comparison of losses, 0 for none. core: the
    one that everything runs on, the last if None.

    Raises:
        UserError: a number that is too small.
    """

    ways: tuple[str, ...] = ()
    laps: int = 5
    steps: int = 2
    warm: int = 1
    curve: int = 0
    core: int | None = None

    def __post_init__(self) -> None:
        command.check_counts(self, zero=("laps", "warm", "curve"))

    @property
    def total(self) -> int:
        """Steps that a way takes in all."""
        return self.laps * (self.warm + self.steps)


@dataclass(frozen=True)
class LoraOptions(StepOptions):
    """Of a benchmark that trains LoRA on a model. data: path of what it learns."""

    model: str = "smollm2"
    data: str = ""
    dtype: str = "bfloat16"
    batch_size: int = 8
    max_length: int = 512
    rank: int = 16

    def work(self, folder: Path, lr: float = Work.lr) -> Work:
        """What the ways are given, the rows in a folder."""
        return Work(
            model=self.model,
            dtype=self.dtype,
            rows=f"{folder}/rows.json",
            steps=self.total,
            batch_size=self.batch_size,
            max_length=self.max_length,
            rank=self.rank,
            lr=lr,
        )

    def adapter(self) -> str:
        """The adapter and the model in words."""
        return (
            f"{self.dtype}, {told(self.model)}; LoRA of rank {self.rank} on every linear of the "
            "decoder, kept in float32 (PEFT's default)"
        )

    def add_to(self, add: Callable[..., Any], data: str, row: str) -> None:
        """Add the fields of this class to a command line. data, row: what they are, in words."""
        add("--model", help=f"default {self.model}")
        add("--data", metavar="PATH", help=f"{data}, default {self.data}")
        add("--dtype", choices=["bfloat16", "float32"], help=f"default {self.dtype}")
        add("--batch-size", type=int, help=f"{row}s of a step, default {self.batch_size}")
        add("--max-length", type=int, help=f"tokens of a {row}, default {self.max_length}")
        add("--rank", type=int, help=f"default {self.rank}")


@dataclass(frozen=True)
class Prepared:
    """What is raced: work whose rows are written. step: one of training, in words.

    beside: what takes turns with the ways. extra: of the race, a section after its speeds. data:
    for the page's JSON.
    """

    work: Work
    step: str
    beside: Mapping[str, Callable[[], Lap]] = field(default_factory=dict)
    extra: Callable[[Race], Section] | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


O = TypeVar("O", bound=StepOptions)  # noqa: E741


@dataclass(frozen=True)
class Bench(Generic[O]):
    """A step benchmark, `loralab bench NAME`.

    quick: options of `--quick`. options: the class of all of them; `arguments` adds its own fields
    to the command line, given `add_argument` and the defaults. references: name of a way -> what
    the columns that compare with it call it. compared: ways whose losses are compared, with those
    of the first. prepare: the work, into a folder that lasts as long as the race.
    """

    name: str
    about: str | None
    title: str
    ways: Mapping[str, Way]
    references: Mapping[str, str]
    options: Callable[..., O]
    arguments: Callable[[Callable[..., Any], O], None]
    prepare: Callable[[O, Path], Prepared]
    quick: Mapping[str, Any]
    compared: Sequence[str] = ()

    @property
    def page(self) -> Path:
        return Path(f"docs/bench-{self.name}.md")


def main(bench: Bench[Any], argv: Sequence[str] | None) -> int:
    """Run a benchmark from the command line."""
    return command.main(
        _parser(bench),
        argv,
        bench.page,
        lambda given, say: run(bench, bench.options(**given), say),
        {"laps": 1, "steps": 1, "warm": 0, **bench.quick},
    )


def run(bench: Bench[O], options: O, say: Say = lambda _: None) -> Table:
    """Race the ways and compare their losses, as far as the options ask for it; the table.

    Raises:
        UserError: an unknown way, nothing to measure or to train on, or what `prepare` raises.
    """
    ways = chosen(options.ways, bench.ways)
    compared = {name: ways[name] for name in bench.compared if name in ways and options.curve}
    if not options.laps and not compared:
        raise UserError("--laps is 0 and no losses are compared: there is nothing to measure")
    core = pin(options.core)
    torch.set_num_threads(1)
    sections: list[Section] = []
    data: dict[str, Any] = {"options": asked(options)}
    with TemporaryDirectory() as folder:
        prepared = bench.prepare(options, Path(folder))
        work = prepared.work
        if options.laps:
            done = race(ways, work, options.laps, options.steps, options.warm, say, prepared.beside)
            sections.append(speed(done, ways, bench.references))
            if prepared.extra is not None:
                sections.append(prepared.extra(done))
            data["ways"] = _raw(done)
        if compared:
            found = curves.measure(compared, work, options.curve, say)
            sections.append(curves.section(found, compared, next(iter(compared))))
            data["losses"] = found.losses
    facts = command.facts(
        *("loralab", "torch", "transformers", "peft", "trl"),
        core=bound(core),
        step=prepared.step,
        laps=(
            f"ways take turns; {options.laps} laps of each, of {options.steps} steps after "
            f"{options.warm} that are not measured"
        ),
    )
    return Table(bench.title, facts, sections, {**prepared.data, **data})


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


def _raw(race: Race) -> dict[str, Any]:
    return {
        name: {
            "tokens_per_second": race.timed[name].tokens_per_second,
            "peak_gb": peak,
            "laps": [asdict(lap) for lap in race.laps(name)],
        }
        for name, peak in race.peaks.items()
    }


def _parser(bench: Bench[Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"loralab bench {bench.name}", description=bench.about)
    add, default = parser.add_argument, bench.options()
    add("--quick", action="store_true", help="one short lap of each: does it all run?")
    add("--ways", nargs="+", metavar="NAME", help=f"of {', '.join(bench.ways)}")
    add("--laps", type=int, help=f"of each way, default {default.laps}; 0: no speed")
    add("--steps", type=int, help=f"of a lap, default {default.steps}")
    add("--warm", type=int, help=f"steps before each lap, not measured, default {default.warm}")
    if bench.compared:
        add("--curve", type=int, metavar="STEPS", help="compare losses too; 0, the default: not")
    add("--core", type=int, help="default: the last one")
    add("--out", type=Path, help=f"page, default {bench.page} (none with --quick or --json)")
    add("--json", type=Path, metavar="FILE", help="write the raw measurements here")
    bench.arguments(add, default)
    return parser
