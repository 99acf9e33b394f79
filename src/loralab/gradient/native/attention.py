"""The compiled attention of training: builds, loads, calls `attention.cpp`."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from loralab.engines.native.build import NativeUnavailableError, load
from loralab.gradient.native.buffers import floats
from loralab.gradient.native.parallel import one_by_one

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention.cpp")
_ENGINE = Path(__file__).parents[2] / "engines" / "native"
INCLUDES = (Path(__file__).with_name("elements.h"), _ENGINE / "gemm.h", _ENGINE / "vectors.h")


class _Shape(ctypes.Structure):
    _fields_ = (
        ("heads", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Give the library's functions their argument types."""
    shape, pointer, count = ctypes.POINTER(_Shape), ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "forward": [shape, pointer, count, count, *[pointer] * 5],
        "backward": [shape, pointer, count, count, *[pointer] * 9],
        "delta": [pointer, pointer, pointer, count, count],
    }
    for name, arguments in signatures.items():
        function = getattr(lib, f"ll_attention_{name}")
        function.argtypes, function.restype = arguments, None
    return lib


class AttentionKernel:
    """Causal attention of sequences end to end: q (tokens, heads, d), k, v (tokens, groups, d).

    All bf16, dense, on the CPU; d even; heads a multiple of groups; lengths sum to tokens.
    """

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib

    def takes(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether it can run this."""
        return q.shape[-1] % 2 == 0 and all(
            t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous()
            for t in (q, k, v)
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The output, like q, and the logarithms of the sums, (tokens, heads) float32.

        Raises:
            ValueError: sizes that do not fit together, which the kernel would read beyond.
        """
        if sum(lengths) != len(q) or k.shape != v.shape or len(k) != len(q):
            raise ValueError(
                f"sequences of {sum(lengths)} tokens, {len(q)} queries, {tuple(k.shape)} keys and "
                f"{tuple(v.shape)} values"
            )
        out, sums = torch.empty_like(q), floats(*q.shape[:2])
        shape, sequences = _described(q, k, scale), _sequences(lengths)
        at = [t.data_ptr() for t in (q, k, v, out, sums)]

        def part(start: int, stop: int) -> None:
            self.lib.ll_attention_forward(shape, sequences, start, stop, *at)

        one_by_one(len(lengths) * k.shape[1], part)
        return out, sums

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lengths: Sequence[int],
        out: Tensor,
        sums: Tensor,
        of_out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        found = [torch.empty_like(t) for t in (q, k, v)]
        delta = torch.empty_like(sums)
        self.lib.ll_attention_delta(
            out.data_ptr(), of_out.data_ptr(), delta.data_ptr(), delta.numel(), q.shape[2]
        )
        shape, sequences = _described(q, k, scale), _sequences(lengths)
        at = [t.data_ptr() for t in (q, k, v, of_out, sums, delta, *found)]

        def part(start: int, stop: int) -> None:
            self.lib.ll_attention_backward(shape, sequences, start, stop, *at)

        one_by_one(len(lengths) * k.shape[1], part)
        return found[0], found[1], found[2]


def _described(q: Tensor, k: Tensor, scale: float) -> _Shape:
    return _Shape(q.shape[1], k.shape[1], q.shape[2], scale)


def _sequences(lengths: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    starts = accumulate(lengths, initial=0)
    flat = [number for pair in zip(starts, lengths, strict=False) for number in pair]
    return (ctypes.c_int64 * len(flat))(*flat)


@cache
def kernel() -> AttentionKernel | None:
    """The kernel; None, logged once, where it cannot be built."""
    try:
        return AttentionKernel(declare(load(SOURCE, INCLUDES)))
    except NativeUnavailableError as error:
        log.warning("attention of the fast step runs in PyTorch alone: %s", error)
        return None
