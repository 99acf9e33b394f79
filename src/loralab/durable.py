"""Files that survive a kill at any moment: written whole or not at all, or one line at a time.

Two promises. `write_whole` shows readers the old bytes or the new ones, never a mixture;
`publish` does so for each file of a folder. `append_line` adds one line of JSON in one write; after
a crash at most the last line is torn, which `read_lines` passes over and `cut_torn_line` removes.
All is on disk (fsync) on return.

What the operating system refuses (full disk, no permission) becomes a `UserError` of one line,
and whatever was on disk before the call stays as it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loralab.errors import UserError

TEMPORARY_PREFIX = ".partial-"
"""Names of unfinished files start so; a crash can leave one behind."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust, such as safetensors, end what the system said."""


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` about `path` into a `UserError` that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refused = _refused(error)
        if refused is None:
            raise
        if refused.errno in _FULL:
            raise UserError(
                f"no space left on disk while writing {path}: free some space, then continue "
                "with --resume; what was written before is kept"
            ) from error
        reason = refused.strerror or str(refused)
        if refused.errno in _FORBIDDEN:
            raise UserError(
                f"cannot write {path}: {reason}; make it writable or choose another --run-dir"
            ) from error
        raise UserError(f"cannot write {path}: {reason}; choose another --run-dir") from error


def _refused(error: Exception) -> OSError | None:
    """What the operating system refused, where that is the error or what it tells of."""
    if isinstance(error, OSError):
        return error
    found = _OS_ERROR.search(str(error))
    if found is None:
        return None
    number = int(found[1])
    return OSError(number, os.strerror(number))


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8) atomically; its folder is made if missing.

    Raises:
        UserError: the system refused; the previous file, if any, is untouched.
    """
    # A lone surrogate in model text must not lose the whole file.
    data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        try:
            try:
                _write_all(handle, data)
                # mkstemp makes private files; a run directory is meant to be read by others too.
                os.fchmod(handle, 0o666 & ~_umask())
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        sync_folder(path.parent)


def publish(directory: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a draft folder, then move its files over so that each appears whole.

    Files of the directory that the draft does not have stay. The draft's are made readable as any
    other file is: safetensors writes them for their owner alone.

    Raises:
        UserError: the system refused; the files before are untouched.
    """
    draft = directory.with_name(f"{TEMPORARY_PREFIX}{directory.name}")
    with explain_os_errors(directory):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write(draft)
        directory.mkdir(parents=True, exist_ok=True)
        for file in sorted(draft.iterdir()):
            make_readable(file)
            sync_file(file)
            os.replace(file, directory / file.name)
        draft.rmdir()
        sync_folder(directory)
    return directory


def make_readable(file: Path) -> None:
    """Give a file the mode that the umask gives to new ones."""
    file.chmod(0o666 & ~_umask())


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append `row` to `path` as one line of JSON and wait until it is on disk.

    Floats keep every bit; numpy and torch scalars are taken as plain numbers.

    Raises:
        UserError: the system refused; the file has the length it had before.
    """
    append_lines(path, [row])


def append_lines(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Append several rows in one write: after a crash some of the last ones may be missing."""
    if not rows:
        return
    data = "".join(json.dumps(row, default=_plain) + "\n" for row in rows).encode()
    with explain_os_errors(path):
        new = not path.exists()
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            length = os.fstat(handle).st_size
            try:
                _write_all(handle, data)
                os.fsync(handle)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, length)
                raise
        finally:
            os.close(handle)
        if new:
            sync_folder(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, [] if there is no file; a torn last line is passed over.

    Raises:
        UserError: a line other than the last is not JSON, so the file is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        row = _row(line)
        if row is None:
            raise UserError(f"{path}, line {number}: not a JSON object; the file is damaged")
        rows.append(row)
    return rows


SEAL = "digests.json"
"""Beside the files of a sealed folder: the digest of each, by its path there."""


def seal(folder: Path) -> None:
    """Note the digest of every file in a folder, for `broken` to compare."""
    with explain_os_errors(folder):
        digests = {name: _digest(folder / name) for name in _files(folder)}
    write_whole(folder / SEAL, json.dumps(digests, indent=1) + "\n")


def broken(folder: Path) -> str | None:
    """What of a sealed folder is not as it was sealed, None of a sound one and of one without a
    seal."""
    try:
        wanted = json.loads((folder / SEAL).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return f"{SEAL} cannot be read"
    if not isinstance(wanted, dict):
        return f"{SEAL} holds no digests"
    for name, digest in wanted.items():
        try:
            if _digest(folder / name) != digest:
                return f"the digest of {name} is another"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _files(folder: Path) -> list[str]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.relative_to(folder).as_posix() for path in found if path.name != SEAL]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def set_damage_aside(path: Path) -> int:
    """Keep the lines of a file that can be read; how many cannot. All of it as it was is then in
    `NAME.damaged.jsonl` beside it, and read_lines takes the rest.

    For logs, whose lines stand for themselves; a journal is another thing.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    sound = [line for line in lines if _row(line) is not None]
    if len(sound) < len(lines):
        with explain_os_errors(path):
            shutil.copyfile(path, path.with_suffix(".damaged.jsonl"))
        write_whole(path, b"".join(line + b"\n" for line in sound))
    return len(lines) - len(sound)


def set_object_aside(path: Path) -> bool:
    """Rename a file of one JSON object that is none to `NAME.damaged.json`; whether it was."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return False
    if _row(data) is not None:
        return False
    with explain_os_errors(path):
        os.replace(path, path.with_suffix(".damaged.json"))
    return True


def cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline, so that the next append starts a fresh line."""
    if not path.exists():
        return
    with explain_os_errors(path), path.open("r+b") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
            os.fsync(file.fileno())


def sync_file(file: Path) -> None:
    """Wait until a file's content is on the disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: without it a rename can be lost with the power."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(value: object) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for method in ("tolist", "item"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
