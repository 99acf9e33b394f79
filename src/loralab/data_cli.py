"""`loralab data`: convert, merge, dedup, split, check, lint.

Each prints one line, or with --json one object. 0: done and sound. 1: `check` found evaluated rows
in the training data, or `lint` a fault.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab.errors import UserError

if TYPE_CHECKING:
    from loralab.data.documents import Document

Options = Callable[[list[str]], dict[str, Any]]
_SHOWN = 20


def add(data: argparse.ArgumentParser, options: Options) -> None:
    """Add the subcommands to `loralab data`. options: reads key=value pairs."""
    below = data.add_subparsers(required=True, metavar="TOOL")

    def tool(name: str, command: Any, text: str, several: bool = False) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = below.add_parser(name, help=text, description=text)
        made.set_defaults(command=command, options=options)
        made.add_argument("path", metavar="PATH", nargs="+" if several else None)
        made.add_argument("--json", action="store_true", help="one object, with everything found")
        return made

    convert = tool("convert", _convert, "HumanEval or MBPP as rows of id, prompt and solution")
    convert.add_argument("--out", required=True, metavar="FILE", help="a new .jsonl or .jsonl.gz")
    convert.add_argument("--split", default="all", help="all (default), train, test, validation")

    merge = tool("merge", _merge, "several files as one", several=True)
    merge.add_argument("--out", required=True, metavar="FILE")

    dedup = tool("dedup", _dedup, "drop rows that are there twice, but for case and space")
    dedup.add_argument("--out", required=True, metavar="FILE")
    dedup.add_argument("--exact", action="store_true", help="only those the same in all characters")

    split = tool("split", _split, "a training and a test file, chosen by a seed")
    split.add_argument("--out", required=True, metavar="DIR", help="gets train and test.jsonl")
    split.add_argument("--test", required=True, type=float, metavar="N", help="rows, or a share")
    split.add_argument("--seed", type=int, default=0, help="default 0")

    check = tool("check", _check, "is a task's evaluation in a training file? 13 words in a row")
    check.add_argument("--task", metavar="NAME", help="whose test split is evaluated on")
    check.add_argument("--option", action="append", default=[], metavar="key=value")
    check.add_argument("--against", action="append", default=[], metavar="PATH", help="rows")

    tool("lint", _lint, "empty, repeated, truncated and mislabelled rows")


def _convert(arguments: argparse.Namespace) -> int:
    from loralab.data.convert import convert
    from loralab.data.sources import read_rows

    made = convert(read_rows(arguments.path), arguments.split)
    _write(arguments.out, made.rows)
    skipped = [{"place": place, "reason": reason} for place, reason in made.skipped]
    text = f"{len(made.rows)} rows, {len(skipped)} skipped: {arguments.out}"
    return _say(arguments, text, {"rows": len(made.rows), "skipped": skipped})


def _merge(arguments: argparse.Namespace) -> int:
    from loralab.data.merge import merge

    rows = merge(arguments.path)
    _write(arguments.out, (row.data for row in rows))
    text = f"{len(rows)} rows of {len(arguments.path)} files: {arguments.out}"
    return _say(arguments, text, {"rows": len(rows)})


def _dedup(arguments: argparse.Namespace) -> int:
    from loralab.data.merge import deduplicate
    from loralab.data.sources import read_rows

    found = deduplicate(read_rows(arguments.path), arguments.exact)
    _write(arguments.out, (row.data for row in found.kept))
    dropped = [{"place": place, "same_as": first} for place, first in found.dropped]
    text = f"{len(found.kept)} rows kept, {len(dropped)} dropped: {arguments.out}"
    return _say(arguments, text, {"rows": len(found.kept), "dropped": dropped})


def _split(arguments: argparse.Namespace) -> int:
    from loralab.data.sources import read_rows
    from loralab.data.split import split

    rows = read_rows(arguments.path)
    size = arguments.test
    if size != size or size <= 0 or (size >= 1 and size != int(size)):
        raise UserError(f"--test {size:g}: expected a number of rows, or a share below 1")
    parts = split(rows, int(size) if size >= 1 else round(size * len(rows)), arguments.seed)
    folder = Path(arguments.out)
    _new(folder / "train.jsonl", folder / "test.jsonl")
    _write(folder / "train.jsonl", (row.data for row in parts.train))
    _write(folder / "test.jsonl", (row.data for row in parts.test))
    text = f"{len(parts.train)} rows to train on, {len(parts.test)} to test: {folder}"
    if parts.shared:
        text += f"; {len(parts.shared)} test prompts are trained on too: dedup first"
    facts = {
        "train": len(parts.train), "test": len(parts.test), "seed": arguments.seed,
        "shared": list(parts.shared),
    }  # fmt: skip
    return _say(arguments, text, facts)


def _check(arguments: argparse.Namespace) -> int:
    from loralab import tasks
    from loralab.data.check import contamination
    from loralab.data.documents import document
    from loralab.data.sources import iter_rows
    from loralab.tasks.documents import documents

    if arguments.task is None and not arguments.against:
        raise UserError("data check needs --task NAME or --against PATH: what is evaluated on")
    evaluated: dict[str, list[Document]] = {
        path: [document(row) for row in iter_rows(path)] for path in arguments.against
    }
    if arguments.task is not None:
        task = tasks.get(arguments.task, **arguments.options(arguments.option))
        evaluated[task.name] = documents(task, "test")
    found = contamination(map(document, iter_rows(arguments.path)), evaluated)
    text = (
        f"{'CONTAMINATED' if found.rows else 'clean'}: {len(found.rows)} evaluated rows in "
        f"{arguments.path}, {len(found.overlaps) - len(found.rows)} rows share 13 words"
    )
    for overlap in found.overlaps[:_SHOWN]:
        text += (
            f"\n  {overlap.train}: {overlap.share:.0%} of {overlap.task} {overlap.example}: "
            f"{overlap.words!r}"
        )
    _say(arguments, text, found.to_dict())
    return 1 if found.rows else 0


def _lint(arguments: argparse.Namespace) -> int:
    from loralab.data.lint import lint
    from loralab.data.sources import read_rows

    rows = read_rows(arguments.path)
    found = lint(rows)
    counts = dict(Counter(finding.kind for finding in found))
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "no fault found"
    text = f"{len(rows)} rows: {said}"
    for finding in found[:_SHOWN]:
        text += f"\n  {finding.place}: {finding.kind}: {finding.reason}"
    facts = {"rows": len(rows), "counts": counts, "findings": [asdict(f) for f in found]}
    _say(arguments, text, facts)
    return 1 if found else 0


def _say(arguments: argparse.Namespace, text: str, facts: Mapping[str, Any]) -> int:
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else text)
    return 0


def _write(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    from loralab.durable import write_whole

    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"--out {path}: expected a name that ends in .jsonl or .jsonl.gz")
    _new(path)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode("utf-8", "replace")
    write_whole(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _new(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise UserError(f"{path} is there already; give another --out, or remove it")
