"""The compiled kernel of LS-LoRA's function: builds, loads and calls `spline.cpp`."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from loralab.engines.native.build import NativeUnavailableError, load
from loralab.gradient.native.buffers import floats
from loralab.gradient.native.parallel import in_parts
from loralab.gradient.spline_curve import Parameters

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("spline.cpp")


class _Spline(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("grid", ctypes.c_void_p),
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
    lib.ll_spline_rows.restype = count
    returning = ["forward", "backward", "gradients"]
    if lib.ll_spline_rows():
        sizes = [count, count, ctypes.c_int]
        lib.ll_spline_product_forward.argtypes = [spline, *[pointer] * 3, *sizes]
        lib.ll_spline_product_backward.argtypes = [spline, *[pointer] * 4, *sizes, pointer]
        returning += ["product_forward", "product_backward"]
    for name in returning:
        getattr(lib, f"ll_spline_{name}").restype = None
    return lib


class SplineKernel:
    """The kernel's two passes, with the interface of `spline_curve.forward` and `.backward`."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.block = int(lib.ll_spline_block())
        self.most_pieces = int(lib.ll_spline_most())
        self.rows = int(lib.ll_spline_rows())

    def takes(self, z: Tensor, parameters: Parameters) -> bool:
        """Whether it can run this."""
        return (
            z.device.type == "cpu"
            and z.dtype in (torch.float32, torch.bfloat16)
            and all(p is None or p.dtype == torch.float32 for p in parameters[:4])
            and parameters.pieces <= self.most_pieces
        )

    def takes_product(self, h: Tensor, b: Tensor) -> bool:
        """Whether it can also make z = h B^T itself, in fp32 and never in memory."""
        return (
            self.rows > 0
            and h.dtype == b.dtype == torch.bfloat16
            and h.shape[1] in (8, 16, 32)
            and b.shape[0] % 32 == 0
            and h.is_contiguous()
            and b.is_contiguous()
        )

    def product_forward(self, h: Tensor, b: Tensor, parameters: Parameters) -> Tensor:
        """The output for z = h B^T; h (rows, r), b (out, r), `takes_product`."""
        spline, (rows, rank), out = _described(parameters), h.shape, b.shape[0]
        y = floats(rows, out, dtype=h.dtype)
        at_h, at_b, at_y = h.data_ptr(), b.data_ptr(), y.data_ptr()

        def part(start: int, stop: int) -> None:
            self.lib.ll_spline_product_forward(
                spline,
                at_h + 2 * start * rank,
                at_b,
                at_y + 2 * start * out,
                stop - start,
                out,
                rank,
            )

        in_parts(rows, self.rows, out, part)
        return y

    def product_backward(
        self, h: Tensor, b: Tensor, gy: Tensor, parameters: Parameters
    ) -> tuple[Tensor, Tensor]:
        """As `backward` for z = h B^T; gy (rows, out) contiguous."""
        spline, (rows, rank), out = _described(parameters), h.shape, b.shape[0]
        gz = torch.empty_like(gy)
        blocks, stride = -(-rows // self.rows), 2 * parameters.pieces * 8
        sums = floats(blocks, 2, parameters.pieces, dtype=torch.float64)
        at_h, at_b, at_gy, at_gz = h.data_ptr(), b.data_ptr(), gy.data_ptr(), gz.data_ptr()
        at_sums = sums.data_ptr()

        def part(start: int, stop: int) -> None:
            self.lib.ll_spline_product_backward(
                spline,
                at_h + 2 * start * rank,
                at_b,
                at_gy + 2 * start * out,
                at_gz + 2 * start * out,
                stop - start,
                out,
                rank,
                at_sums + start // self.rows * stride,
            )

        in_parts(rows, self.rows, out, part)
        return gz, self._gradients(spline, sums, parameters)

    def forward(self, z: Tensor, parameters: Parameters) -> Tensor:
        """z contiguous, overwritten with the output."""
        spline, at_z = _described(parameters), z.data_ptr()
        width, is_bf16 = z.element_size(), z.dtype == torch.bfloat16

        def part(start: int, stop: int) -> None:
            self.lib.ll_spline_forward(spline, at_z + start * width, stop - start, is_bf16)

        in_parts(z.numel(), self.block, 1, part)
        return z

    def backward(self, z: Tensor, gy: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """z and gy contiguous, of one type; z is overwritten with its gradient."""
        spline, at_z, at_gy = _described(parameters), z.data_ptr(), gy.data_ptr()
        width, is_bf16 = z.element_size(), z.dtype == torch.bfloat16
        blocks, stride = -(-z.numel() // self.block), 2 * parameters.pieces * 8
        sums = floats(blocks, 2, parameters.pieces, dtype=torch.float64)
        at_sums = sums.data_ptr()

        def part(start: int, stop: int) -> None:
            self.lib.ll_spline_backward(
                spline,
                at_z + start * width,
                at_gy + start * width,
                stop - start,
                is_bf16,
                at_sums + start // self.block * stride,
            )

        in_parts(z.numel(), self.block, 1, part)
        return z, self._gradients(spline, sums, parameters)

    def _gradients(self, spline: _Spline, sums: Tensor, parameters: Parameters) -> Tensor:
        gradients = floats(parameters.values.shape[0] + 3)
        self.lib.ll_spline_gradients(spline, sums.data_ptr(), sums.shape[0], gradients.data_ptr())
        return gradients


@cache
def kernel() -> SplineKernel | None:
    """The kernel; None, logged once, where it cannot be built."""
    try:
        return SplineKernel(declare(load(SOURCE)))
    except NativeUnavailableError as error:
        log.warning("LS-LoRA's fast step runs in PyTorch alone, which is slower: %s", error)
        return None


def _described(parameters: Parameters) -> _Spline:
    """The parameters as the kernel reads them; valid while `parameters` live."""
    grid = parameters.grid
    described = _Spline(
        parameters.values.data_ptr(),
        grid.data_ptr(),
        parameters.input_scale.data_ptr(),
        parameters.output_scale.data_ptr(),
        None if parameters.gate is None else parameters.gate.data_ptr(),
        parameters.k_min,
        parameters.k_max,
        parameters.values.shape[0],
        parameters.clamp,
    )
    described.kept = grid  # a shared tensor, of which a cache may let go
    return described
