"""A disk that is full: a small one whose size is stepped, and each single refusal of the system."""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loralab.bench.resilience.child import Child
from loralab.bench.resilience.rows import Row, Trial, ending, shown
from loralab.bench.resilience.world import Scene
from loralab.errors import UserError

PAGE = 4096
"""Bytes by which the size of the small disk is stepped: what it gives out at a time."""
_HERE = "loralab.bench.resilience.disk"
_REFUSABLE = ("write", "open", "fsync", "replace", "mkdir")


def small_disk(scene: Scene, steps: int | None, say: Callable[[str], None]) -> Row:
    """A run on a disk of 4 KiB, 8 KiB, ... until it fits; then space is made and it is resumed.

    steps: so many sizes, evenly; None takes every one. Where no disk can be mounted, no file may be
    larger than the size.
    """
    most = sum(f.stat().st_size + PAGE for f in scene.reference.rglob("*") if f.is_file())
    sizes = list(range(PAGE, 2 * most, PAGE))
    mounts = os.geteuid() == 0 and _can_mount(scene.folder)
    found: list[Trial] = []
    every = 1 if steps is None else max(1, most // PAGE // steps)
    for size in sizes[::every]:
        trial = _on_disk(scene, size) if mounts else _in_small_files(scene, size)
        if trial is None:
            break
        if trial.wrong:
            say(f"disk of {size} bytes: {trial.wrong}")
        found.append(trial)
    return Row(f"disk full, {'sizes of a tmpfs' if mounts else 'sizes of a file'}", found)


def refusals(scene: Scene, steps: int | None, say: Callable[[str], None]) -> Row:
    """The system refuses one call that writes, as a full disk does: the first, the second, ..."""
    path = scene.new()
    counted = scene.folder / "calls.txt"
    prepare = f"{_HERE}:refuse"
    child = scene.start(path, prepare, number=-1, folder=str(path), counted=str(counted))
    child.ended()
    calls = int(counted.read_text())
    found = []
    for number in range(0, calls, 1 if steps is None else max(1, calls // steps)):
        path = scene.new()
        child = scene.start(path, prepare, number=number, folder=str(path), counted=str(counted))
        trial = _judged(scene, child, path)
        if trial is None:  # it was refused what it could do without
            trial = ending(scene.difference(path), 0, "", "")
        if trial.wrong:
            say(f"refusal {number} of {calls}: {trial.wrong}")
        found.append(trial)
        shutil.rmtree(path, ignore_errors=True)
    return Row("disk full, each call that writes refused once", found)


def _judged(
    scene: Scene, child: Child, path: Path, make_space: Callable[[], None] = lambda: None
) -> Trial | None:
    """A run that met the full disk: one line, nothing lost, and after space is made the same end.
    None of one that fitted."""
    code = child.ended()
    if code == 0:
        return None
    line, told, kept = child.error, len(child.said.splitlines()), scene.kept(path)
    make_space()
    again = scene.start(path)
    end = again.ended()
    trial = ending(scene.difference(path), end, shown(_place(line, path), path), again.error)
    if code == 2 and line and kept and told and "traceback" not in line:
        return trial
    why = f"exit code {code}: {line}; what was there is {'kept' if kept else 'lost'}"
    return Trial(False, trial.identical, trial.said, why)


def _place(line: str, path: Path) -> str:
    """The line with FILE for the file it names: each step has another one."""
    named = [word for word in line.split() if str(path) in word]
    for word in named:
        line = line.replace(word.strip(":,;"), "FILE")
    return line


def _on_disk(scene: Scene, size: int) -> Trial | None:
    with _mounted(scene.folder / "disk", size) as disk:
        path = disk / "run"

        def make_space() -> None:
            _mount("-o", "remount,size=256m", str(disk))

        return _judged(scene, scene.start(path), path, make_space)


def _in_small_files(scene: Scene, size: int) -> Trial | None:
    path = scene.new()
    child = scene.start(path, f"{_HERE}:limit_files", size=size)
    return _judged(scene, child, path)


@contextmanager
def _mounted(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench resilience: mount {' '.join(words)}: {done.stderr.strip()}")


def _can_mount(folder: Path) -> bool:
    try:
        with _mounted(folder / "disk", PAGE):
            return True
    except (UserError, OSError):
        return False


def limit_files(size: int) -> None:
    """In the run's process: no file of its may be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def refuse(number: int, folder: str, counted: str) -> None:
    """In the run's process: its call `number` that writes below `folder` is refused for want of
    space, all others are not; how many there were is written at the end of each."""
    calls = 0
    ours: set[int] = set()

    def refused(what: Any) -> None:
        nonlocal calls
        calls += 1
        if number < 0:
            with real_open(counted, "w") as file:
                file.write(str(calls))
        if calls - 1 == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(what))

    def below(what: Any) -> bool:
        if isinstance(what, int):
            return what in ours
        return str(what).startswith(folder)

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(what: Any, *arguments: Any, **named: Any) -> Any:
            writes = name != "open" or arguments[0] & (os.O_WRONLY | os.O_RDWR)
            concerned = below(what) or (name == "replace" and below(arguments[0]))
            if concerned and writes:
                refused(what)
            made = real(what, *arguments, **named)
            if name == "open":  # a number is used again when its file is closed
                (ours.add if concerned and writes else ours.discard)(made)
            return made

        return call

    real_open = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if set(mode) & set("wax+") and not isinstance(file, int) and below(file):
            refused(file)
        return real_open(file, mode, *arguments, **named)

    for name in _REFUSABLE:
        setattr(os, name, watched(name))
    for module in (io, builtins):
        module.open = opened  # type: ignore[attr-defined]
