"""Files of a stopped or finished run that changed on disk before it is resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from loralab.bench.resilience.rows import Row, Trial, ending, general, shown
from loralab.bench.resilience.world import GENERATIONS, Scene

WEIGHTS = "adapter_model.safetensors"
LOGS = ("metrics.jsonl",)
INITIALISED: Mapping[str, Any] = {"adapter": {"init": {"name": "pissa"}}}
"""A start that is kept in files: PiSSA's adapter, and what it took out of the weights."""


@dataclass(frozen=True)
class Damage:
    """What is damaged in how.

    initialised: of a run whose start is in files. finished: of a run that was complete, not one
    that stopped half way. mark: what the line says that tells of it.
    """

    label: str
    file: str
    harm: Callable[[bytes, Random], bytes]
    mark: str
    initialised: bool = False
    finished: bool = False


def flipped(data: bytes, random: Random) -> bytes:
    """With one bit changed, wherever it is."""
    changed = bytearray(data)
    changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(data: bytes, random: Random) -> bytes:
    """Without its end, however long."""
    return data[: random.randrange(len(data))]


def header_flipped(data: bytes, random: Random) -> bytes:
    """With one bit of the first line changed."""
    end = data.index(b"\n")
    return flipped(data[:end], random) + data[end:]


def line_flipped(data: bytes, random: Random) -> bytes:
    """With one bit changed behind the first line; not in the last newline, without which the last
    line is one that was never written to its end."""
    end = data.index(b"\n") + 1
    return data[:end] + flipped(data[end:-1], random) + data[-1:]


def lines_cut(data: bytes, random: Random) -> bytes:
    """Cut somewhere behind the first line."""
    end = data.index(b"\n") + 1
    return data[:end] + cut(data[end:], random)


def torn_inside(data: bytes, random: Random) -> bytes:
    """With a line that is no JSON any more."""
    lines = data.splitlines(keepends=True)
    place = random.randrange(len(lines))
    lines[place] = b"\x00" + lines[place][1:]
    return b"".join(lines)


_SUM = "the checksum does not match"
_ANEW = "anew from the journal"
DAMAGES = (
    Damage("journal line, a bit flipped", "journal.jsonl", line_flipped, _SUM),
    Damage("journal header, a bit flipped", "journal.jsonl", header_flipped, _SUM),
    Damage("journal cut short", "journal.jsonl", lines_cut, ""),
    Damage("start file, a bit flipped", f"start/adapter/{WEIGHTS}", flipped, "was damaged", True),
    Damage("start file cut short", f"start/adapter/{WEIGHTS}", cut, "was damaged", True),
    Damage(
        "start's base part, a bit flipped", f"start/taken/{WEIGHTS}", flipped, "was damaged", True
    ),
    Damage("adapter file, a bit flipped", f"adapter/{WEIGHTS}", flipped, _ANEW, False, True),
    Damage("adapter file cut short", f"adapter/{WEIGHTS}", cut, _ANEW, False, True),
    Damage(
        "checkpoint, a bit flipped", f"checkpoints/final/{WEIGHTS}", flipped, _ANEW, False, True
    ),
    Damage("checkpoint cut short", f"checkpoints/final/{WEIGHTS}", cut, _ANEW, False, True),
    Damage("metrics, a line damaged", "metrics.jsonl", torn_inside, "damaged lines are left out"),
    Damage("timings cut short", "timings.json", cut, "damaged; time is counted anew"),
)


def damages(
    damage: Damage, scene: Scene, trials: int, random: Random, say: Callable[[str], None]
) -> Row:
    """So many runs resumed with that file harmed, each another way."""
    found = []
    for number in range(trials):
        trial = _trial(damage, scene, random)
        if trial.wrong:
            say(f"{damage.label}, trial {number}: {trial.wrong}")
        found.append(trial)
    return Row(damage.label, found)


def _trial(damage: Damage, scene: Scene, random: Random) -> Trial:
    path = scene.new()
    shutil.copytree(scene.reference, path)
    if not damage.finished:
        halve(path, random.randint(1, GENERATIONS - 1))
    file = path / damage.file
    file.write_bytes(damage.harm(file.read_bytes(), random))
    child = scene.start(path)
    code = child.ended()
    lines = child.said.splitlines()
    wanted = damage.mark or "resumed at generation"
    said = next((shown(line, path) for line in lines if wanted in line), "")
    # What a damaged log told is lost with its line, and kept beside it.
    difference = scene.difference(path, logs=damage.file not in LOGS)
    trial = ending(difference, code, general(said), child.error)
    if damage.mark and not said and trial.wrong is None:
        return Trial(False, trial.identical, "", f"{damage.file} was harmed and nothing said so")
    return trial


def halve(path: Path, generations: int) -> None:
    """Leave a run as a kill leaves it that came after so many generations."""
    journal = path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: generations + 1]))
    for made in ("checkpoints", "figures"):
        shutil.rmtree(path / made)
    (path / "report.html").unlink()
