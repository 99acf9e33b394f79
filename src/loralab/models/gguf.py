"""A GGUF file as a safetensors model directory, dequantised once and kept in the user's cache.

Transformers reads GGUF (weights, config, chat template); three things it leaves to us: it takes
16 s for 135M parameters, so the result is kept; what it loads cannot be saved as it stands; and it
forgets that some tokenizers cut numbers into single digits (with SmolLM2 "a  1" then becomes other
tokens than the model was trained on).
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from hashlib import blake2b
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from loralab.errors import UserError

CONVERSION = 1
"""Part of a cached model's name: raise it when a change here makes old results wrong."""

SINGLE_DIGITS = {"smollm", "starcoder", "refact"}
"""Values of tokenizer.ggml.pre that mean GPT-2's pattern after cutting out each digit."""


class Reader(GGUFReader):  # type: ignore[misc]
    """Refuses to read past the end: an array that claims 2^60 elements would never be done.

    Raises:
        ValueError: the file ends early; and all sorts besides, as `gguf` does on damaged files.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends early, or counts more than it holds")
        return super()._get(offset, dtype, count, override_order)


def cache_root() -> Path:
    """Where models are kept: XDG_CACHE_HOME/loralab/models, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "loralab" / "models"


def as_directory(path: Path, dtype: torch.dtype) -> Path:
    """The model directory for a GGUF file, made now if no earlier call made it.

    Named by the content of the file, so a changed file is converted anew. Many processes may ask
    at once: one converts, the others wait. Raises UserError if the file is not a GGUF of a model
    that Transformers knows, or the cache cannot be written.
    """
    name = f"{path.stem}-{_digest(path)}-{str(dtype).removeprefix('torch.')}-v{CONVERSION}"
    target = cache_root() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(name + ".lock")):
            if not target.is_dir():
                _convert_into(path, target, dtype)
    except OSError as error:
        raise UserError(
            f"cannot write the model cache {target.parent}: {error.strerror or error}; "
            "free some space or set XDG_CACHE_HOME to a writable directory"
        ) from error
    return target


def _convert_into(path: Path, target: Path, dtype: torch.dtype) -> None:
    """Under the lock: no one else writes `partial`, and what is left in it is a killed run's."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _convert(path, partial, dtype)
        for file in partial.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(path: Path, into: Path, dtype: torch.dtype) -> None:
    try:
        # Before Transformers, whose reader takes any count in the file for true.
        pre = Reader(path).get_field("tokenizer.ggml.pre")
        with redirect_stderr(StringIO()):  # a progress bar that no setting switches off
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the readers raise all sorts, bare Exception among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as a GGUF model: {reason}") from error
    if pre is not None and pre.contents() in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizers(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    tokenizer.save_pretrained(into)

    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(into)
    model.generation_config.save_pretrained(into)
    tied = set(model.all_tied_weights_keys)
    tensors = {
        name: tensor.to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})


def _digest(path: Path) -> str:
    h = blake2b(digest_size=8)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            h.update(chunk)
    return h.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for it. It vanishes with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
