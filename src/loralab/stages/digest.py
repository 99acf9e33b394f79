"""What a stage is a function of, as one number: its config, and the bytes that it reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from loralab.config import AnyConfig
from loralab.config.references import references, texts
from loralab.durable import explain_os_errors

_SIZE = 16
_CHUNK = 1 << 20
_ANYTHING = ("path", "model", "adapter", "generator", "reference", "teacher")
"""Last words of keys whose value may name a file or folder without a slash in it."""


def stage_digest(config: AnyConfig, outputs: Mapping[str, str]) -> str:
    """Hex digest of a stage: equal exactly when it would be given the same.

    It covers the resolved config (references as they are written), the content of what those
    references stand for, and the content of each file or folder that the config names. It does
    not cover the program, nor models and data that come by a hub name or with a package.

    outputs: digest of the content of each reference, by the reference.
    """
    values = config.to_dict()
    data = {key: content_digest([path]) for key, path in local_paths(config).items()}
    text = json.dumps([values, dict(outputs), data], sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=_SIZE).hexdigest()


def local_paths(config: AnyConfig) -> dict[str, Path]:
    """Files and folders that a config names, by dotted key."""
    values = config.to_dict()
    referred = {reference.key for reference in references(values, config.name)}
    found = {}
    for key, text in texts(values):
        if key in referred or (os.sep not in text and not key.endswith(_ANYTHING)):
            continue
        if len(text) < 4096 and "\n" not in text and "\0" not in text:
            path = Path(text).expanduser()
            if path.exists():
                found[key] = path
    return found


def content_digest(paths: Iterable[Path]) -> str:
    """Hex digest of files, and of every file in folders with its path there. Hidden ones, such as
    locks and what a killed writer left, do not count.

    Raises:
        UserError: one cannot be read.
    """
    whole = blake2b(digest_size=_SIZE)
    for path in paths:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            inside = "" if file == path else file.relative_to(path).as_posix()
            if any(part.startswith(".") for part in inside.split("/")):
                continue
            whole.update(f"{inside}\0".encode())
            whole.update(_file_digest(file))
    return whole.hexdigest()


def _file_digest(file: Path) -> bytes:
    made = blake2b(digest_size=_SIZE)
    with explain_os_errors(file), file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            made.update(chunk)
    return made.digest()


def plain_inputs(outputs: Mapping[str, str], config: AnyConfig) -> dict[str, Any]:
    """What the journal keeps of a stage's inputs, to see afterwards what it read."""
    named = {key: str(path) for key, path in local_paths(config).items()}
    return {"read": dict(outputs), "files": named}
