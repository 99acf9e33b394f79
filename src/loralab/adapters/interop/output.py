"""A file or directory that appears whole and never replaces what is there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from loralab.durable import TEMPORARY_PREFIX, sync_folder
from loralab.errors import UserError


def refuse_existing(output: Path) -> None:
    """Raise UserError if something is there, be it a broken link; an empty directory may be."""
    if output.is_dir() and not output.is_symlink() and not any(output.iterdir()):
        return
    if os.path.lexists(output):
        raise UserError(f"--output {output}: exists already and is kept; choose another name")


@contextmanager
def whole(output: Path) -> Iterator[Path]:
    """A path to write a file or a flat directory at; it becomes `output` when all is on disk.

    Raises:
        UserError: something appeared at `output` meanwhile; it is kept, what was written is not.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=output.parent))
    made = scratch / output.name
    try:
        yield made
        for file in [made] if made.is_file() else made.iterdir():
            if made.is_dir():
                # safetensors makes files that only their owner can read.
                file.chmod(made.stat().st_mode & 0o666)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        _place(made, output)
        sync_folder(output.parent)
    except SafetensorError as error:
        raise UserError(f"cannot write {output}: {error}") from error
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise UserError(f"--output {output}: appeared meanwhile and is kept") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _place(made: Path, output: Path) -> None:
    """Move without replacing anything: a rename would replace a file."""
    if made.is_dir():
        made.rename(output)
        return
    try:
        os.link(made, output)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV) or output.exists():
            raise
        made.rename(output)  # a file system without hard links
