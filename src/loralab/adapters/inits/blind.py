"""Initialisations that look at nothing but shapes."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from loralab.adapters.inits.base import Context, Facts, LoraInit
from loralab.errors import UserError

Positive = Annotated[float, Field(gt=0)]

_GRID_BITS = 7


def kaiming(rows: int, columns: int, generator: Generator) -> Tensor:
    """U(-1/sqrt(columns), 1/sqrt(columns)): what nn.Linear, and so PEFT, draws for A."""
    return (2 * torch.rand(rows, columns, generator=generator) - 1) / sqrt(columns)


def orthonormal(rows: int, columns: int, generator: Generator) -> Tensor:
    """`rows` random orthonormal vectors of length `columns`, in rows; at most `columns` of them."""
    q: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q
    return q.T


@dataclass(frozen=True)
class ZeroB:
    """A random, B zero: the start of LoRA itself.

    a: "kaiming" is U(-1/sqrt(in), 1/sqrt(in)), PEFT's default; "gaussian" is N(0, 1/in), three
        times its variance. Without options a run by gradient keeps PEFT's own draw of the former,
        and a search does not come here: evolution's own default is N(0, 1/in), drawn from the
        counter-based stream.
    """

    facts: ClassVar = Facts(
        formula="A ~ U(±1/√in) or N(0, 1/in), B = 0",
        source="Hu et al. 2021, arXiv:2106.09685",
        unchanged="exactly",
        cost="none",
        needs="nothing",
    )
    a: Literal["kaiming", "gaussian"] = "kaiming"

    def __call__(
        self, weight: Tensor, rank: int, generator: Generator, context: Context
    ) -> LoraInit:
        d_out, d_in = weight.shape
        if self.a == "kaiming":
            a = kaiming(rank, d_in, generator)
        else:
            a = torch.randn(rank, d_in, generator=generator) / sqrt(d_in)
        return LoraInit(a, torch.zeros(d_out, rank))


@dataclass(frozen=True)
class Random:
    """Both factors random, at the size nn.Linear gives them: a broken adapter, for tests.

    The model is garbled before the first step. PEFT does it under `init_lora_weights=False`.
    """

    facts: ClassVar = Facts(
        formula="A ~ U(±1/√in), B ~ U(±1/√r)",
        source="PEFT, init_lora_weights=False; a fault on purpose",
        unchanged="no: garbled",
        cost="none",
        needs="nothing",
    )

    def __call__(
        self, weight: Tensor, rank: int, generator: Generator, context: Context
    ) -> LoraInit:
        d_out, d_in = weight.shape
        return LoraInit(kaiming(rank, d_in, generator), kaiming(d_out, rank, generator))


@dataclass(frozen=True)
class Tiny:
    """Both factors random at `scale` of their usual size, so the product is at scale squared."""

    facts: ClassVar = Facts(
        formula="A ~ c·U(±1/√in), B ~ c·U(±1/√r), c = 0.01 to 0.1",
        source="folklore; measured here",
        unchanged="no, a little",
        cost="none",
        needs="nothing",
    )
    scale: Positive = 0.03

    def __call__(
        self, weight: Tensor, rank: int, generator: Generator, context: Context
    ) -> LoraInit:
        d_out, d_in = weight.shape
        a, b = kaiming(rank, d_in, generator), kaiming(d_out, rank, generator)
        return LoraInit(self.scale * a, self.scale * b)


@dataclass(frozen=True)
class Orthogonal:
    """Pairs that cancel: A = [P; P] and B = [Q, -Q], with orthonormal rows of P, columns of Q.

    Both factors move from the first step on and B A is zero, exactly: the entries lie on a grid of
    2^-7 of the largest, so that every product and partial sum is exact in fp32, in any order, and
    bf16 holds them. The rounding to that grid leaves P and Q orthonormal to about a per cent.
    b_scale is the norm of each column of B (of each row of A it is 1).
    """

    facts: ClassVar = Facts(
        formula="A = [P; P], B = [Q, −Q], PPᵀ = QᵀQ = I",
        source="this project (PEFT's `orthogonal` pairs rows of one random rotation instead)",
        unchanged="product exactly zero; output to rounding",
        cost="QR of an (in, r/2) matrix a module",
        needs="an even rank",
    )
    b_scale: Positive = 1.0

    def __call__(
        self, weight: Tensor, rank: int, generator: Generator, context: Context
    ) -> LoraInit:
        d_out, d_in = weight.shape
        half = rank // 2
        if rank % 2 or half > min(d_out, d_in):
            raise UserError(
                f"orthogonal: {context.site.name} ({d_out}, {d_in}) with rank {rank}; expected an "
                "even rank, at most twice the narrower side"
            )
        p = _on_grid(orthonormal(half, d_in, generator))
        q = _on_grid(self.b_scale * orthonormal(half, d_out, generator)).T
        return LoraInit(torch.cat([p, p], 0), torch.cat([q, -q], 1))


@dataclass(frozen=True)
class OrthogonalNegative:
    """A orthonormal and B = -A^T / scaling, which an old note calls near zero. It is not.

    scaling * B A = -A^T A is minus a projector: it takes r directions of the input (and as many
    rows of the output) and subtracts them. Kept, and measured, to show it.
    """

    facts: ClassVar = Facts(
        formula="AAᵀ = I, B = −Aᵀ/s (rows cut or padded with zeros to out)",
        source="a note that calls it near-zero; s·BA = −AᵀA is minus a projector",
        unchanged="no",
        cost="QR of an (in, r) matrix a module",
        needs="nothing",
        needs_plain=True,
    )

    def __call__(
        self, weight: Tensor, rank: int, generator: Generator, context: Context
    ) -> LoraInit:
        d_out, d_in = weight.shape
        if rank > d_in:
            raise UserError(
                f"orthogonal_negative: {context.site.name} has {d_in} inputs, the rank is {rank}"
            )
        a = orthonormal(rank, d_in, generator)
        b = torch.zeros(d_out, rank)
        shared = min(d_out, d_in)
        b[:shared] = -a.T[:shared] / context.scaling
        return LoraInit(a, b)


def _on_grid(values: Tensor) -> Tensor:
    """Rounded to multiples of a power of two that leave at most 7 bits and the sign."""
    step = 2.0 ** (torch.log2(values.abs().max()).floor() + 1 - _GRID_BITS)
    return (values / step).round() * step
