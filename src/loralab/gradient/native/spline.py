"""The compiled kernel of LS-LoRA's function: builds, loads and calls `spline.cpp`."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from loralab.engines.native.build import NativeUnavailableError, load
from loralab.gradient.spline_curve import Curve

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("spline.cpp")
PARALLEL = 2**18
"""Elements from which the work is shared among torch's threads."""


class _Spline(ctypes.Structure):
    _fields_ = (
        ("deviation", ctypes.c_void_p),
        ("input_scale", ctypes.c_void_p),
        ("output_scale", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("k_min", ctypes.c_float),
        ("k_max", ctypes.c_float),
        ("knots", ctypes.c_int),
        ("clamp", ctypes.c_int),
    )


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Give the library's functions their argument types."""
    spline, pointer, count = ctypes.POINTER(_Spline), ctypes.c_void_p, ctypes.c_int64
    lib.ll_spline_block.restype = count
    lib.ll_spline_most.restype = ctypes.c_int
    lib.ll_spline_forward.argtypes = [spline, pointer, count, ctypes.c_int]
    lib.ll_spline_backward.argtypes = [spline, pointer, pointer, count, ctypes.c_int, pointer]
    lib.ll_spline_gradients.argtypes = [spline, pointer, count, pointer]
    for name in ("forward", "backward", "gradients"):
        getattr(lib, f"ll_spline_{name}").restype = None
    return lib


class SplineKernel:
    """The kernel's two passes, with the interface of `spline_curve.forward` and `.backward`."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.block = int(lib.ll_spline_block())
        self.most_pieces = int(lib.ll_spline_most())

    def takes(self, z: Tensor, curve: Curve) -> bool:
        """Whether it can run this."""
        return (
            z.device.type == "cpu"
            and z.dtype in (torch.float32, torch.bfloat16)
            and curve.deviation.dtype == torch.float32
            and curve.pieces <= self.most_pieces
        )

    def forward(self, z: Tensor, curve: Curve) -> Tensor:
        """z contiguous, overwritten with the output."""
        spline = _described(curve)
        width, is_bf16 = z.element_size(), z.dtype == torch.bfloat16

        def part(start: int, stop: int) -> None:
            self.lib.ll_spline_forward(spline, z.data_ptr() + start * width, stop - start, is_bf16)

        self._in_parts(z.numel(), part)
        return z

    def backward(self, z: Tensor, gy: Tensor, curve: Curve) -> tuple[Tensor, Tensor]:
        """z and gy contiguous, of one type; z is overwritten with its gradient."""
        spline = _described(curve)
        width, is_bf16 = z.element_size(), z.dtype == torch.bfloat16
        at_z, at_gy = z.data_ptr(), gy.data_ptr()
        blocks = -(-z.numel() // self.block)
        sums = torch.empty(blocks, 2, curve.pieces, dtype=torch.float64)
        stride = 2 * curve.pieces * 8

        def part(start: int, stop: int) -> None:
            self.lib.ll_spline_backward(
                spline,
                z.data_ptr() + start * width,
                gy.data_ptr() + start * width,
                stop - start,
                is_bf16,
                sums.data_ptr() + start // self.block * stride,
            )

        self._in_parts(z.numel(), part)
        gradients = torch.empty(curve.deviation.shape[0] + 3)
        self.lib.ll_spline_gradients(spline, sums.data_ptr(), blocks, gradients.data_ptr())
        return z, gradients

    def _in_parts(self, count: int, part: Callable[[int, int], None]) -> None:
        threads = torch.get_num_threads()
        if threads == 1 or count < PARALLEL:
            part(0, count)
            return
        size = -(-count // (threads * self.block)) * self.block
        starts = range(0, count, size)
        # ctypes lets go of the interpreter's lock while the kernel runs.
        list(_pool(threads).map(part, starts, [min(at + size, count) for at in starts]))


@cache
def kernel() -> SplineKernel | None:
    """The kernel; None, logged once, where it cannot be built."""
    try:
        return SplineKernel(declare(load(SOURCE)))
    except NativeUnavailableError as error:
        log.warning("LS-LoRA's fast step runs in PyTorch alone, which is slower: %s", error)
        return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="loralab-spline")


def _described(curve: Curve) -> _Spline:
    """The parameters as the kernel reads them; valid while `curve` lives."""
    return _Spline(
        curve.deviation.data_ptr(),
        curve.input_scale.data_ptr(),
        curve.output_scale.data_ptr(),
        None if curve.gate is None else curve.gate.data_ptr(),
        curve.k_min,
        curve.k_max,
        curve.deviation.shape[0],
        curve.clamp,
    )
