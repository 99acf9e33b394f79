"""The journal: one line a generation, from which alone a search can be rebuilt to the last bit.

`journal.jsonl` opens with a header (config, seed, shapes, sigmas, kernel, versions) and then holds
one line a generation: the training examples used, the fitness of the members, the digest of the
adapter after. Noise is drawn again from its key, so neither members nor adapters are stored.

Each line ends in a checksum over its own bytes and the checksum of the line before, so a flipped
bit, a lost line or a swapped one is seen. A line is on disk before the next generation starts;
a torn last line, as a kill leaves it, is simply not there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from loralab import durable
from loralab.errors import UserError

FORMAT = 1
_MARK = b', "sum": "'
_SUM_SIZE = 16
_TAIL = len(_MARK) + 2 * _SUM_SIZE + len(b'"}')


@dataclass(frozen=True)
class Header:
    """What a search is, but for its rewards.

    config: the whole resolved config. shapes: (out, in) of each module searched. sigmas: noise of
    each tensor before schedules, as `float.hex`. start: digest of the point before generation 0.
    model: fingerprint of the base weights. kernel: what generates; two kernels give two texts.
    """

    config: Mapping[str, Any]
    config_digest: str
    seed: int
    shapes: Mapping[str, tuple[int, int]]
    sigmas: Mapping[str, str]
    reward_floor: float
    start: str
    model: str
    kernel: str
    versions: Mapping[str, str | None]
    format: int = FORMAT


@dataclass(frozen=True)
class HeldOut:
    """Score of the unperturbed point. correct: share, None where the task has no such notion."""

    reward: float
    correct: float | None


@dataclass(frozen=True)
class Entry:
    """One generation.

    indices: of the training examples. fitness: (P,), or (P, prompts) if the search compares
    members prompt by prompt. digest: of the point after the update. held_out: of the point before
    it, in generations that measure it.
    """

    generation: int
    indices: tuple[int, ...]
    fitness: tuple[float, ...] | tuple[tuple[float, ...], ...]
    digest: str
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class Contents:
    """What a journal holds, up to the first line that cannot be trusted.

    damage: what is wrong with that line and where, None if the journal is sound.
    sound_bytes: length of the part that is used. last_sum: checksum of its last line.
    """

    header: Header
    entries: tuple[Entry, ...]
    damage: str | None
    sound_bytes: int
    last_sum: str


class Journal:
    """A journal being written."""

    def __init__(self, path: Path, last_sum: str) -> None:
        self.path = path
        self._last_sum = last_sum

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """Start a journal with its header."""
        row, checksum = _sealed(asdict(header), "")
        durable.write_whole(path, json.dumps(row) + "\n")
        return cls(path, checksum)

    @classmethod
    def resume(cls, path: Path, contents: Contents) -> Journal:
        """Go on after the sound part; what lies behind it is moved to `journal.damaged.jsonl`."""
        with durable.explain_os_errors(path):
            if contents.damage is not None:
                shutil.copyfile(path, path.with_suffix(".damaged.jsonl"))
            if path.stat().st_size > contents.sound_bytes:
                with path.open("r+b") as file:
                    file.truncate(contents.sound_bytes)
                    os.fsync(file.fileno())
        return cls(path, contents.last_sum)

    def append(self, entry: Entry) -> None:
        """Add a generation; it is on disk on return. Raises UserError if the disk refuses."""
        row, checksum = _sealed(asdict(entry), self._last_sum)
        durable.append_line(self.path, row)
        self._last_sum = checksum


def read(path: Path) -> Contents:
    """Read a journal as far as it is sound.

    Raises:
        UserError: there is none, or its very header is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no journal at {path}: only a run of kind evolve has one") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    lines = data.split(b"\n")[:-1]  # what follows the last newline is torn
    first = _opened(lines[0], "") if lines else None
    if first is None:
        raise UserError(f"{path}: the header is damaged, nothing can be rebuilt; start a new run")
    header = _header(first[0], path)
    entries: list[Entry] = []
    last_sum, sound = first[1], len(lines[0]) + 1
    damage = None
    for number, line in enumerate(lines[1:], start=2):
        opened = _opened(line, last_sum)
        if opened is None or opened[0].get("generation") != len(entries):
            damage = (
                f"{path}, line {number}: the checksum does not match; the {len(entries)} "
                f"generations before it are used, {len(lines) - number + 1} lines are not"
            )
            break
        entries.append(_entry(opened[0]))
        last_sum, sound = opened[1], sound + len(line) + 1
    return Contents(header, tuple(entries), damage, sound, last_sum)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two configs differ, each with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{prefix}.{key}" if prefix else str(key)
            lines += differences(old.get(key), new.get(key), inner)
        return lines
    return [] if old == new else [f"{prefix} was {json.dumps(old)}, is {json.dumps(new)}"]


def _sealed(row: dict[str, Any], previous: str) -> tuple[dict[str, Any], str]:
    """The row with its checksum as last key, and the checksum."""
    checksum = _checksum(json.dumps(row, allow_nan=False).encode(), previous)
    return {**row, "sum": checksum}, checksum


def _opened(line: bytes, previous: str) -> tuple[dict[str, Any], str] | None:
    """The row of a line and its checksum, None if they do not belong together."""
    body, tail = line[:-_TAIL] + b"}", line[-_TAIL:]
    checksum = tail[len(_MARK) : -2].decode("ascii", "replace")
    if not tail.startswith(_MARK) or not line.endswith(b'"}'):
        return None
    if checksum != _checksum(body, previous):
        return None
    row = json.loads(body)
    return (row, checksum) if isinstance(row, dict) else None


def _checksum(body: bytes, previous: str) -> str:
    return blake2b(previous.encode() + body, digest_size=_SUM_SIZE).hexdigest()


def _header(row: dict[str, Any], path: Path) -> Header:
    if row.get("format") != FORMAT:
        raise UserError(
            f"{path}: journal format {row.get('format')!r}; this loralab reads {FORMAT}"
        )
    shapes = {name: (out, in_) for name, (out, in_) in row.pop("shapes").items()}
    return Header(shapes=shapes, **row)


def _entry(row: dict[str, Any]) -> Entry:
    held_out = row["held_out"]
    return Entry(
        generation=row["generation"],
        indices=tuple(row["indices"]),
        fitness=tuple(tuple(f) if isinstance(f, list) else f for f in row["fitness"]),
        digest=row["digest"],
        held_out=None if held_out is None else HeldOut(**held_out),
    )
