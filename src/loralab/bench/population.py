"""`loralab bench population`: tokens per second of a population, side by side on one core.

Every member of a population of LoRA adapters answers the same prompts, greedy, a fixed number of
tokens past any end token. The ways to do so take turns in one process (vLLM in a worker of its
own environment, idle while the others run), all on one core.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loralab.bench import command
from loralab.bench.command import Say, asked, bound, told
from loralab.bench.competitors import OURS, REFERENCE, ROWS, Garage, Options
from loralab.bench.peers import Peer, Tokens
from loralab.bench.table import Cell, Section, Table
from loralab.bench.timing import Lap, Timed, peak_in_child, peak_rss_gb, pin, take_turns
from loralab.bench.vllm_peer import Vllm
from loralab.bench.workloads import (
    LONG,
    SHORT,
    UNSHARED,
    Members,
    Workload,
    build,
    equal_share,
)
from loralab.errors import UserError

PAGE = Path("docs/bench-population.md")
QUICK: dict[str, Any] = {"members": 3, "tokens": 8, "repeats": 1, "long_prompts": 4, "peaks": ()}


@dataclass
class Entrant:
    """A competitor at the start line, and what it last generated."""

    peer: Peer
    members: Members
    generated: Tokens

    def lap(self, work: Workload) -> Lap:
        """Load the members, generate, check the count of tokens."""
        gc.collect()
        start = time.perf_counter()
        self.peer.load(self.members)
        loaded = time.perf_counter()
        cpu = self.peer.cpu_seconds()
        begin = time.perf_counter()
        self.generated = self.peer.generate(work)
        end = time.perf_counter()
        cpu = self.peer.cpu_seconds() - cpu
        lengths = {len(sequence) for sequence in self.generated}
        wanted = len(self.members) * len(work.ids)
        if lengths != {work.tokens} or len(self.generated) != wanted:
            raise RuntimeError(
                f"{self.peer.detail}: {len(self.generated)} sequences of {sorted(lengths)} tokens, "
                f"expected {wanted} of {work.tokens}: the speeds would not compare"
            )
        return Lap(loaded - start, end - begin, cpu, wanted * work.tokens)


@dataclass(frozen=True)
class Result:
    """One workload: what each row took, and the share of texts equal to the reference's."""

    work: Workload
    timed: Mapping[str, Timed]
    equal: Mapping[str, float]


def run(
    options: Options, loaded: tuple[Any, Any] | None = None, say: Say = lambda _: None
) -> Table:
    """Measure, and make the table.

    loaded: a model and its tokenizer, in place of `options.model`.

    Raises:
        UserError: an unknown row or workload, a number that is too small, or a model that cannot
            be loaded.
    """
    command.check_counts(options)
    rows = _chosen(options)
    core = pin(options.core)
    torch.set_num_threads(1)
    model, tokenizer = loaded or _load(options)
    workloads = [build(name, tokenizer, *_size(options, name)) for name in options.workloads]
    garage = Garage(options, model, tokenizer, workloads, copies=True)
    entrants: dict[str, Entrant] = {}
    try:
        skipped = _line_up(entrants, garage, rows, workloads[0], say)
        results = [_race(work, entrants, options, say) for work in workloads]
    finally:
        for entrant in entrants.values():
            entrant.peer.close()
    peaks = {name: _peak_in_child(name, options, say) for name in options.peaks if name in entrants}
    facts = command.facts(
        *("loralab", "torch", "transformers", "peft"),
        core=bound(core),
        population=(
            f"{options.members} members, rank {options.rank} on every linear of the decoder, RMS "
            f"of the change {options.fraction:g} x mean |W|, {options.dtype}, "
            f"{told(options.model)}"
        ),
        laps=(
            "rows take turns; medians over the laps that the `laps` column gives, slowest to "
            "fastest beside them"
        ),
    )
    kernels = {name: entrant.peer.detail for name, entrant in entrants.items()}
    sections = [_section(result, kernels) for result in results]
    sections += _closing(results, skipped, peaks)
    data = {
        "options": asked(options),
        "kernels": kernels,
        "skipped": skipped,
        "peak_gb": peaks,
        "workloads": {result.work.name: _raw(result) for result in results},
    }
    return Table("Population benchmark", facts, sections, data)


def peak_of(name: str, options: Options) -> float:
    """Run one row once on the short workload; peak memory in GB of this process (or the worker).

    Includes loading the model, so it must be called in a process that has done nothing else.
    """
    pin(options.core)
    torch.set_num_threads(1)
    model, tokenizer = _load(options)
    work = build(SHORT, tokenizer, *_size(options, SHORT))
    garage = Garage(options, model, tokenizer, [work], copies=False)
    del model
    peer = ROWS[name].make(garage)
    try:
        Entrant(peer, garage.members(ROWS[name].noise), []).lap(work)
        return peer.peak_gb() if isinstance(peer, Vllm) else peak_rss_gb()
    finally:
        peer.close()


def _load(options: Options) -> tuple[Any, Any]:
    from loralab.models.load import load

    return load(options.model, options.dtype)


def _chosen(options: Options) -> list[str]:
    for given, known, what in (
        (options.rows, ROWS, "row"),
        (options.peaks, ROWS, "row"),
        (options.workloads, (SHORT, LONG, UNSHARED), "workload"),
    ):
        for name in given:
            if name not in known:
                raise UserError(f"unknown {what} {name!r}: expected one of {', '.join(known)}")
    return [name for name in ROWS if not options.rows or name in options.rows]


def _size(options: Options, workload: str) -> tuple[int, int]:
    prompts = options.short_prompts if workload == SHORT else options.long_prompts
    return prompts, options.tokens


def _line_up(
    entrants: dict[str, Entrant],
    garage: Garage,
    rows: Sequence[str],
    warm_up: Workload,
    say: Say,
) -> dict[str, str]:
    """Add every row to the entrants and have it generate a little; why those left out cannot."""
    skipped: dict[str, str] = {}
    for name in rows:
        row = ROWS[name]
        try:
            entrant = Entrant(row.make(garage), garage.members(row.noise), [])
        except UserError as error:
            skipped[name] = str(error)
            say(f"{name}: skipped: {error}")
            continue
        entrants[name] = entrant
        lap = entrant.lap(warm_up.shortened(prompts=1, tokens=2))
        say(f"{name}: ready ({entrant.peer.detail}), warm-up {lap.load + lap.run:.1f} s")
    return skipped


def _race(work: Workload, entrants: Mapping[str, Entrant], options: Options, say: Say) -> Result:
    # Sharing no prefix matters to the engine that shares; the others do not care.
    names = [name for name in entrants if work.name != UNSHARED or name == OURS]
    say(f"{work.name}: {work.describe()}")
    timed = take_turns(
        {name: lambda name=name: entrants[name].lap(work) for name in names},  # type: ignore[misc]
        options.repeats,
        options.budget,
        lambda name, turn, lap: say(
            f"{work.name} {turn + 1}/{options.repeats} {name}: {lap.tokens / lap.run:.1f} "
            f"tokens/s, {lap.tokens / lap.cpu:.1f} by processor time, loaded in {lap.load:.2f} s"
        ),
    )
    equal = {}
    if REFERENCE in names:
        expected = entrants[REFERENCE].generated
        equal = {
            name: equal_share(entrants[name].generated, expected)
            for name in names
            if ROWS[name].comparable and name != REFERENCE
        }
    return Result(work, timed, equal)


def _peak_in_child(name: str, options: Options, say: Say) -> float:
    given: dict[str, object] = {
        "peak-of": name,
        "model": options.model,
        "dtype": options.dtype,
        "members": options.members,
        "short-prompts": options.short_prompts,
        "tokens": options.tokens,
        "vllm-python": options.vllm_python,
    }
    if options.core is not None:
        given["core"] = options.core
    words = [f"--{key}={value}" for key, value in given.items()]
    peak = peak_in_child("loralab.bench.population", words, name)
    say(f"{name}: peak memory {peak:.2f} GB")
    return peak


def _ours(timed: Mapping[str, Timed]) -> Timed | None:
    return timed.get(OURS) or timed.get("torch")


def _section(result: Result, kernels: Mapping[str, str]) -> Section:
    ours = _ours(result.timed)
    rows: list[list[Cell]] = []
    for name, timed in result.timed.items():
        slowest, fastest = timed.spread
        rate = timed.tokens_per_second
        rows.append(
            [
                ROWS[name].label,
                rate,
                f"{slowest:.0f} to {fastest:.0f}",
                None if ours is None else ours.tokens_per_second / rate,
                timed.load_seconds,
                f"{timed.core_share:.0%}",
                len(timed.laps),
                None if name not in result.equal else f"{result.equal[name]:.0%}",
                kernels[name],
            ]
        )
    columns = [
        "way",
        "tokens/s",
        "spread",
        "ours is x",
        "load s",
        "core",
        "laps",
        "same text",
        "ran",
    ]
    work = result.work
    return Section(f"{len(work.ids)} {work.title}", work.describe() + ".", columns, rows)


def _closing(
    results: Sequence[Result], skipped: Mapping[str, str], peaks: Mapping[str, float]
) -> list[Section]:
    notes = [
        "`tokens/s` counts generated tokens over the time of prefill and decode, text included; "
        "`load s` is the time to make this generation's members known (packing for loralab, "
        "copying into slots for PEFT, writing and loading files for vLLM) and is not in it. "
        "`core`: share of the time in which the row had the core to itself; much below 100 % "
        "other work disturbed it. "
        "`same text`: share of sequences equal to the reference way's, token for token; in "
        "bf16, kernels that round differently part ways at near ties."
    ]
    by_name = {result.work.name: result.timed for result in results}
    unshared, long = by_name.get(UNSHARED, {}).get(OURS), by_name.get(LONG, {})
    if unshared is not None and REFERENCE in long:
        times = unshared.tokens_per_second / long[REFERENCE].tokens_per_second
        notes.append(
            f"Without a shared prefix loralab is {times:.2f} x the reference way on the prompts "
            "that share one (which it does not use)."
        )
    notes += [f"{ROWS[name].label}: skipped, {reason}." for name, reason in skipped.items()]
    rows: list[list[Cell]] = [[ROWS[name].label, peak] for name, peak in peaks.items()]
    intro = (
        "Highest resident memory of a fresh process that loads the model and runs the first "
        "workload once, in GB (10^9 bytes)."
        if rows
        else "Memory was not measured."
    )
    return [Section("Memory and notes", intro, ["way", "peak GB"], rows, notes)]


def _raw(result: Result) -> dict[str, Any]:
    return {
        "prompts": len(result.work.ids),
        "prompt_tokens": [len(ids) for ids in result.work.ids],
        "shared_prefix": result.work.shared_prefix,
        "new_tokens": result.work.tokens,
        "rows": {
            name: {
                "tokens_per_second": timed.tokens_per_second,
                "core_share": timed.core_share,
                "load_seconds": timed.load_seconds,
                "equal_to_reference": result.equal.get(name),
                "laps": [asdict(lap) for lap in timed.laps],
            }
            for name, timed in result.timed.items()
        },
    }


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(prog="loralab bench population", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny sizes, one lap: does it all run?")
    add("--model", help=f"default {default.model}")
    add("--dtype", choices=["bfloat16", "float32"])
    add("--members", type=int, help=f"default {default.members}")
    add("--short-prompts", type=int, help=f"default {default.short_prompts}")
    add("--long-prompts", type=int, help=f"default {default.long_prompts}")
    add("--tokens", type=int, help=f"new tokens of each sequence, default {default.tokens}")
    add("--repeats", type=int, help=f"laps of each row, default {default.repeats}")
    add("--budget", type=float, help="seconds after which a row sits out further rounds")
    add("--workloads", nargs="+", metavar="NAME", help=f"of {SHORT}, {LONG}, {UNSHARED}")
    add("--rows", nargs="+", metavar="NAME", help=f"of {', '.join(ROWS)}")
    add("--peaks", nargs="*", metavar="ROW", help="rows to measure the memory of; default ours")
    add("--core", type=int, help="default: the last one")
    add("--vllm-python", type=Path, help=f"default {default.vllm_python}")
    add("--out", type=Path, help=f"page to write, default {PAGE} (none with --quick)")
    add("--peak-of", choices=list(ROWS), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when measured, 2 for what the user can mend."""
    return command.main(
        _parser(),
        argv,
        PAGE,
        lambda given, say: run(Options(**given), say=say),
        QUICK,
        lambda row, given: peak_of(row, Options(**given)),
    )


if __name__ == "__main__":
    sys.exit(main())
