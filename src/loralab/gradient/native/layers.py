"""The compiled kernels between a decoder's matrix products: builds, loads, calls `layers.cpp`."""

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

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("layers.cpp")
INCLUDES = (
    Path(__file__).with_name("elements.h"),
    Path(__file__).parents[2] / "engines" / "native" / "vectors.h",
)
LANES = 16
"""What widths have to be multiples of."""
_TYPES = (torch.float32, torch.bfloat16)


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Give the library's functions their argument types."""
    pointer, count, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    signatures = {
        "norm_forward": [*[pointer] * 4, count, count, real, flag],
        "norm_backward": [*[pointer] * 6, count, count, flag],
        "swiglu_forward": [*[pointer] * 3, count, flag],
        "swiglu_backward": [*[pointer] * 5, count, flag],
        "rotate": [pointer, count, pointer, pointer, real, pointer, count, count, count, flag],
        "cross_entropy": [*[pointer] * 3, count, count, flag, flag],
    }
    for name, arguments in signatures.items():
        function = getattr(lib, f"ll_{name}")
        function.argtypes, function.restype = arguments, None
    return lib


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels can run on these: on the CPU, dense, all bf16 or all fp32."""
    dtype = tensors[0].dtype
    return dtype in _TYPES and all(
        t.device.type == "cpu" and t.dtype == dtype and t.is_contiguous() for t in tensors
    )


class LayerKernels:
    """The kernels on tensors that `takes` lets through; rows are the leading dimensions."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib

    def norm_forward(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x weight / rms(x), and 1 / rms(x) (rows,); x (..., d), weight (d,) float32."""
        d = x.shape[-1]
        rows, size = x.numel() // d, x.element_size()
        y, inverse = torch.empty_like(x), floats(rows)
        at_x, at_y, at_i, at_w = x.data_ptr(), y.data_ptr(), inverse.data_ptr(), weight.data_ptr()

        def part(start: int, stop: int) -> None:
            skip = start * d * size
            self.lib.ll_norm_forward(
                at_x + skip, at_w, at_y + skip, at_i + 4 * start, stop - start, d, eps, size == 2
            )

        in_parts(rows, 1, d, part)
        return y, inverse

    def norm_backward(
        self, x: Tensor, weight: Tensor, inverse: Tensor, gy: Tensor, of_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and, float32 (d,), of the weight where it is wanted."""
        d = x.shape[-1]
        rows, size = x.numel() // d, x.element_size()
        gx = torch.empty_like(x)
        # Sums over a fixed number of rows each: they must not depend on the number of threads.
        block = 256
        sums = floats(-(-rows // block), d).zero_() if of_weight else None
        at_x, at_i, at_gy, at_gx = x.data_ptr(), inverse.data_ptr(), gy.data_ptr(), gx.data_ptr()
        at_w, at_sums = weight.data_ptr(), 0 if sums is None else sums.data_ptr()

        def part(start: int, stop: int) -> None:
            for at in range(start, stop, block) if of_weight else (start,):
                skip, count = at * d * size, (min(block, stop - at) if of_weight else stop - at)
                self.lib.ll_norm_backward(
                    at_x + skip,
                    at_w,
                    at_i + 4 * at,
                    at_gy + skip,
                    at_gx + skip,
                    at_sums + 4 * (at // block) * d if of_weight else None,
                    count,
                    d,
                    size == 2,
                )

        in_parts(rows, block, d, part)
        return gx, None if sums is None else sums.sum(dim=0)

    def swiglu_forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up; the number of elements is a multiple of `LANES`."""
        y, size = torch.empty_like(gate), gate.element_size()
        at = [t.data_ptr() for t in (gate, up, y)]

        def part(start: int, stop: int) -> None:
            skip = start * LANES * size
            self.lib.ll_swiglu_forward(*(p + skip for p in at), (stop - start) * LANES, size == 2)

        in_parts(gate.numel() // LANES, 1, LANES, part)
        return y

    def swiglu_backward(self, gate: Tensor, up: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up."""
        of_gate, of_up, size = torch.empty_like(gate), torch.empty_like(up), gate.element_size()
        at = [t.data_ptr() for t in (gate, up, gy, of_gate, of_up)]

        def part(start: int, stop: int) -> None:
            skip = start * LANES * size
            self.lib.ll_swiglu_backward(*(p + skip for p in at), (stop - start) * LANES, size == 2)

        in_parts(gate.numel() // LANES, 1, LANES, part)
        return of_gate, of_up

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
        """Rotary positions: x (rows, heads, d) turned by cos, sin (rows, d / 2) float32."""
        rows, heads, d = x.shape
        y, size, wide = torch.empty_like(x), x.element_size(), heads * d
        at_x, at_y, at_cos, at_sin = x.data_ptr(), y.data_ptr(), cos.data_ptr(), sin.data_ptr()

        def part(start: int, stop: int) -> None:
            skip, turn = start * wide * size, start * d // 2 * 4
            self.lib.ll_rotate(
                at_x + skip,
                wide,
                at_cos + turn,
                at_sin + turn,
                -1.0 if back else 1.0,
                at_y + skip,
                stop - start,
                heads,
                d,
                size == 2,
            )

        in_parts(rows, 1, wide, part)
        return y

    def cross_entropy(self, logits: Tensor, targets: Tensor, slopes: bool) -> Tensor:
        """-log softmax(logits)[target], float32 (rows,); logits (rows, v), targets (rows,) int64.

        slopes: logits are overwritten with the gradient of the sum of the losses.
        """
        rows, v = logits.shape
        loss, size = floats(rows), logits.element_size()
        at, at_targets, at_loss = logits.data_ptr(), targets.data_ptr(), loss.data_ptr()

        def part(start: int, stop: int) -> None:
            self.lib.ll_cross_entropy(
                at + start * v * size,
                at_targets + 8 * start,
                at_loss + 4 * start,
                stop - start,
                v,
                slopes,
                size == 2,
            )

        in_parts(rows, 1, v, part)
        return loss


@cache
def kernels() -> LayerKernels | None:
    """The kernels; None, logged once, where they cannot be built."""
    try:
        return LayerKernels(declare(load(SOURCE, INCLUDES)))
    except NativeUnavailableError as error:
        log.warning("the fast step runs in PyTorch alone, which is slower: %s", error)
        return None
