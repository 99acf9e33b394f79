"""The journal: exact round trips, and every flipped bit is seen."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from loralab.errors import UserError
from loralab.evolution.journal import (
    Contents,
    DamagedHeader,
    Entry,
    Header,
    HeldOut,
    Journal,
    read,
)

HEADER = Header(
    config={"seed": 3, "evolution": {"lr": 0.1, "stop": ["\n", "é"]}},
    config_digest="c0",
    seed=3,
    shapes={"a.q": (3, 4), "a.up": (5, 4)},
    sigmas={"a.q.B": (0.1 + 0.2).hex(), "a.up.B": (1 / 3).hex()},
    reward_floor=-1000.0,
    start="d0",
    model="m0",
    kernel="native",
    versions={"torch": "2.13.0", "numpy": None},
)


def entries(count: int = 6) -> list[Entry]:
    rng = random.Random(0)
    return [
        Entry(
            g,
            (g, g + 1),
            tuple(rng.gauss(-100, 30) / 3 for _ in range(4))
            if g % 2
            else tuple((rng.random() / 7, -rng.random() * 1e-300) for _ in range(4)),
            f"{rng.getrandbits(128):032x}",
            HeldOut(rng.random() / 3, None if g else 0.25) if g % 3 == 0 else None,
        )
        for g in range(count)
    ]


def write(path: Path, count: int = 6) -> Journal:
    journal = Journal.create(path, HEADER)
    for entry in entries(count):
        journal.append(entry)
    return journal


def test_it_gives_back_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path)
    contents = read(path)
    assert contents.header == HEADER
    assert list(contents.entries) == entries()
    assert contents.damage is None
    assert contents.sound_bytes == path.stat().st_size


def test_it_goes_on_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, 3)
    journal = Journal.resume(path, read(path))
    for entry in entries()[3:]:
        journal.append(entry)
    whole = tmp_path / "whole.jsonl"
    write(whole)
    assert path.read_bytes() == whole.read_bytes()


def test_a_line_torn_anywhere_is_as_if_never_written(tmp_path: Path) -> None:
    path, whole = tmp_path / "journal.jsonl", tmp_path / "whole.jsonl"
    write(whole, 4)
    write(path, 3)
    before, after = path.read_bytes(), whole.read_bytes()
    for cut in range(len(before), len(after)):
        path.write_bytes(after[:cut])
        contents = read(path)
        assert contents.damage is None
        assert len(contents.entries) == 3
    Journal.resume(path, contents).append(entries()[3])
    assert path.read_bytes() == after


def test_every_flipped_bit_is_seen_and_what_precedes_it_used(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path)
    data = path.read_bytes()
    header_end = data.index(b"\n") + 1
    rng = random.Random(1)
    for position in rng.sample(range(header_end, len(data) - 1), 300):
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        line = data[:position].count(b"\n")  # lines before the damaged one, header included
        contents = read(path)
        assert list(contents.entries) == entries()[: line - 1]
        assert contents.damage is not None
        assert f"line {line + 1}" in contents.damage
        assert f"{line - 1} generations" in contents.damage
        assert contents.sound_bytes == len(b"".join(data.splitlines(True)[:line]))


def test_lines_lost_swapped_or_repeated_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path)
    lines = path.read_bytes().splitlines(True)
    for changed in (
        [*lines[:2], *lines[3:]],
        [*lines[:2], lines[3], lines[2], *lines[4:]],
        [*lines[:3], *lines[2:]],
    ):
        path.write_bytes(b"".join(changed))
        contents = read(path)
        assert contents.damage is not None
        assert len(contents.entries) in (1, 2)


def test_a_line_of_another_run_is_seen(tmp_path: Path) -> None:
    path, other = tmp_path / "journal.jsonl", tmp_path / "other.jsonl"
    write(path)
    journal = Journal.create(other, replace(HEADER, seed=4))
    for entry in entries():
        journal.append(entry)
    ours, theirs = (p.read_bytes().splitlines(True) for p in (path, other))
    path.write_bytes(b"".join([*ours[:4], theirs[4], *ours[5:]]))
    assert len(read(path).entries) == 3


def test_what_is_cut_off_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path)
    data = bytearray(path.read_bytes())
    lines = bytes(data).splitlines(True)
    data[len(b"".join(lines[:4])) + 30] ^= 1
    path.write_bytes(data)
    Journal.resume(path, read(path))
    assert path.read_bytes() == b"".join(lines[:4])
    assert (tmp_path / "journal.damaged.jsonl").read_bytes() == data


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\xfe\n", b'{"seed": 1'])
def test_a_damaged_header_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="the header is damaged"):
        read(path)


def test_no_journal_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no journal at"):
        read(tmp_path / "journal.jsonl")


def test_fitness_that_is_no_number_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = write(path, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        journal.append(Entry(1, (0,), (float("nan"),), "d"))
    contents: Contents = read(path)
    assert len(contents.entries) == 1


def damaged(path: Path, position: int) -> bytes:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize("where", ["inside", "its checksum", "its newline"])
def test_a_damaged_header_is_made_again_where_the_next_line_proves_it(
    tmp_path: Path, where: str
) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, 3)
    before = path.read_bytes()
    end = before.index(b"\n")
    bad = damaged(path, {"inside": 20, "its checksum": end - 5, "its newline": end}[where])
    with pytest.raises(DamagedHeader, match="the header is damaged"):
        read(path)
    with pytest.raises(DamagedHeader):
        read(path, replace(HEADER, seed=4))
    contents = read(path, HEADER)
    assert contents.header == HEADER
    assert list(contents.entries) == entries(3)
    assert contents.damage is not None
    assert "line 1: the checksum does not match; made again" in contents.damage
    journal = Journal.resume(path, contents)
    assert path.read_bytes() == before
    assert (tmp_path / "journal.damaged.jsonl").read_bytes() == bad
    journal.append(entries(4)[3])
    assert len(read(path).entries) == 4


def test_a_header_cut_short_and_a_damaged_line_behind_it_are_both_told(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, 4)
    lines = path.read_bytes().splitlines(True)
    lines[0] = lines[0][:30] + b"\n"
    lines[3] = lines[3].replace(b"digest", b"digits")
    path.write_bytes(b"".join(lines))
    contents = read(path, HEADER)
    assert len(contents.entries) == 2
    assert contents.damage is not None
    assert "line 1" in contents.damage
    assert "line 4: the checksum does not match; the 2 generations" in contents.damage
    Journal.resume(path, contents)
    assert read(path).damage is None


def test_without_a_generation_a_new_header_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, 0)
    before = path.read_bytes()
    path.write_bytes(before[:40])
    Journal.resume(path, read(path, HEADER))
    assert path.read_bytes() == before
