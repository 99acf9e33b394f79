"""Compiles the native kernels on first use and keeps them in the user's cache.

The library speaks plain C through ctypes, so it needs a C++ compiler and nothing else: no torch
headers, no ninja, about five seconds, once for each machine and version.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path

DECODER = Path(__file__).with_name("decoder.cpp")
HEADERS = ("vectors.h", "gemm.h", "attention.h", "model.h", "forward.h")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-fPIC",
    "-shared",
    "-pthread",
    "-w",
)


class NativeUnavailableError(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why."""


def _processor() -> str:
    """What -march=native depends on: a library built on one machine must not run on a lesser."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.platform()}"


def _machine_flag() -> str:
    arm = platform.machine() in ("arm64", "aarch64")
    return "-mcpu=native" if arm else "-march=native"


def find_compiler() -> str:
    """$CXX or the first C++ compiler on the path. Raises NativeUnavailableError without one."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name):
            return name
    raise NativeUnavailableError("no C++ compiler found (c++, g++, clang++ or $CXX)")


def cache_directory() -> Path:
    """Where compiled libraries are kept: `$XDG_CACHE_HOME/loralab/native`."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "loralab" / "native"


def compile_library(compiler: str, target: Path, machine: str, source: Path = DECODER) -> None:
    """Build the kernels into `target`, for the processor that the flag `machine` names."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A temporary name and a rename: two processes may build at once.
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    command = [compiler, *FLAGS, machine, str(source), "-o", temporary]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if result.returncode:
            first = (result.stderr.strip().splitlines() or ["no message"])[0]
            raise NativeUnavailableError(f"{compiler} failed on the native kernels: {first}")
        os.replace(temporary, target)
    except subprocess.TimeoutExpired:
        raise NativeUnavailableError(f"{compiler} took over 300 s on the native kernels") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Give the library's functions their argument types."""
    c_int, c_float, pointer, c_long = (
        ctypes.c_int,
        ctypes.c_float,
        ctypes.c_void_p,
        ctypes.c_int64,
    )
    signatures: dict[str, tuple[list[type], type | None]] = {
        "ll_new": ([c_int] * 8 + [c_float] * 2, pointer),
        "ll_free": ([pointer], None),
        "ll_set_module": ([pointer, c_int, c_int, pointer, pointer], None),
        "ll_set_norm": ([pointer, c_int, c_int, pointer], None),
        "ll_set_window": ([pointer, c_int, c_int], None),
        "ll_set_tables": ([pointer] * 4, None),
        "ll_set_head": ([pointer] * 2, None),
        "ll_set_members": ([pointer, c_int, c_int, c_float], None),
        "ll_set_lora": ([pointer, c_int, c_int, pointer, pointer, pointer, c_int], None),
        "ll_page_bytes": ([pointer], c_long),
        "ll_forward": (
            [pointer, c_int, *[pointer] * 5, c_long, pointer, c_long, c_int, *[pointer] * 3, c_int],
            None,
        ),
        "ll_kernel": ([], ctypes.c_char_p),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(lib, name)
        function.argtypes = arguments
        function.restype = result
    return lib


def load(source: Path, includes: Sequence[Path] = ()) -> ctypes.CDLL:
    """The library of one C++ file, compiled if this version of it is not in the cache.

    includes: the files it includes, whose changes must compile it anew.
    Raises NativeUnavailableError where there is no compiler.
    """
    compiler = find_compiler()
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False
    ).stdout
    key = blake2b(digest_size=12)
    for part in (version, _processor(), " ".join(FLAGS)):
        key.update(part.encode())
    for file in (*includes, source):
        key.update(file.read_bytes())
    target = cache_directory() / f"{source.stem}-{key.hexdigest()}.so"
    try:
        if not target.exists():
            compile_library(compiler, target, _machine_flag(), source)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeUnavailableError(f"cannot keep or load the native kernels: {error}") from error


@cache
def library() -> ctypes.CDLL:
    """The compiled decoder. Raises NativeUnavailableError where there is no compiler."""
    return declare(load(DECODER, [DECODER.with_name(name) for name in HEADERS]))
