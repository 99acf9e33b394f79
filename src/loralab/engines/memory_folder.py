"""A folder in memory for what another process reads by its path, gone with the process that made
it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from loralab.errors import UserError

MEMORY = Path("/dev/shm")
_PREFIX = "loralab-members-"
_LOCK = "lock"


class MemoryFolder:
    """A new folder, in memory where there is a folder for it, else among temporary files.

    place: a folder to make it in instead, seen by the reader under the same path. Whoever made one
    holds a lock in it for as long as it lives; what a killed process left behind is removed by the
    next one to come.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(self, place: str | None = None) -> None:
        root = Path(place) if place is not None else _memory()
        _sweep(root)
        try:
            self.path, self._lock = _make(root)
            if place is not None:
                # Of another user perhaps is the server that reads there.
                self.path.chmod(0o755)
        except OSError as error:
            raise UserError(f"cannot write to {root}: {error.strerror or error}") from error
        self._close = weakref.finalize(self, _remove, self.path, self._lock)

    def close(self) -> None:
        """Remove it and what is in it."""
        self._close()


def _memory() -> Path:
    return MEMORY if os.access(MEMORY, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _make(root: Path) -> tuple[Path, int]:
    """A folder and the lock that is held in it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (path / _LOCK).exists():
            return path, lock
        os.close(lock)  # another process took it for an old one before it was locked


def _remove(path: Path, lock: int) -> None:
    # The lock last: without it nobody would know the rest for left behind.
    with suppress(OSError):
        for entry in path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != _LOCK:
                entry.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        os.close(lock)


def _sweep(root: Path) -> None:
    """Remove folders of ours whose maker lives no more."""
    for path in root.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or one that is being made this moment
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
        else:
            _remove(path, lock)
