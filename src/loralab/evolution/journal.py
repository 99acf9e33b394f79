"""The journal: one line a generation, from which alone a search can be rebuilt to the last bit.

`journal.jsonl` opens with a header (config, seed, shapes, sigmas, kernel, versions) and then holds
one line a generation: the training examples used, the fitness of the members, the digest of the
adapter after. Noise is drawn again from its key, so neither members nor adapters are stored.

Each line ends in a checksum over its own bytes and the checksum of the line before, so a flipped
bit, a lost line or a swapped one is seen. A line is on disk before the next generation starts;
a torn last line, as a kill leaves it, is simply not there. A damaged header can be made again from
the config and the model: the checksum of the line behind it proves that it is the same one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
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
    mended: the part that is used, where it is not what the file begins with.
    """

    header: Header
    entries: tuple[Entry, ...]
    damage: str | None
    sound_bytes: int
    last_sum: str
    mended: bytes | None = None


class DamagedHeader(UserError):
    """A journal whose first line cannot be trusted, and nothing else is there to take for it."""


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
            if contents.mended is not None:
                durable.write_whole(path, contents.mended)
            elif path.stat().st_size > contents.sound_bytes:
                with path.open("r+b") as file:
                    file.truncate(contents.sound_bytes)
                    os.fsync(file.fileno())
        return cls(path, contents.last_sum)

    def append(self, entry: Entry) -> None:
        """Add a generation; it is on disk on return. Raises UserError if the disk refuses."""
        row, checksum = _sealed(asdict(entry), self._last_sum)
        durable.append_line(self.path, row)
        self._last_sum = checksum


def read(path: Path, header: Header | None = None) -> Contents:
    """Read a journal as far as it is sound.

    header: what this run would begin with, taken for a damaged one where the lines behind it prove
    that it was the same.

    Raises:
        DamagedHeader: the header is damaged and `header` is not given or not proven.
        UserError: there is none.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no journal at {path}: only a run of kind evolve has one") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    contents = _contents(data, path)
    if contents is None and header is not None:
        contents = _with_header(data, header, path)
    if contents is None:
        raise DamagedHeader(
            f"{path}: the header is damaged, nothing can be rebuilt; start a new run"
        )
    return contents


def _contents(data: bytes, path: Path) -> Contents | None:
    """What these bytes hold, None if they do not begin with a sound header."""
    lines = data.split(b"\n")[:-1]  # what follows the last newline is torn
    first = _opened(lines[0], "") if lines else None
    if first is None:
        return None
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


def _with_header(data: bytes, header: Header, path: Path) -> Contents | None:
    """The journal with its damaged header replaced: by as many bytes, as a flipped bit asks for, or
    up to the first newline; None if no line behind it fits."""
    row, _ = _sealed(asdict(header), "")
    line = json.dumps(row).encode() + b"\n"
    behind = data.partition(b"\n")[2]
    for rest in (data[len(line) :], behind):
        found = _contents(line + rest, path)
        # Without a generation there is nothing to lose, and nothing that could prove it.
        if found is not None and (found.entries or b"\n" not in behind):
            damage = f"{path}, line 1: the checksum does not match; made again from the config"
            if found.damage is not None:
                damage = f"{damage}. {found.damage}"
            sound = (line + rest)[: found.sound_bytes]
            return replace(found, damage=damage, mended=sound)
    return None


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
