"""Initialisations fitted to something: a weight change, typical inputs, a quantisation error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from loralab.adapters.delta import low_rank_delta
from loralab.adapters.inits.base import Context, Facts, LoraInit
from loralab.adapters.inits.blind import kaiming, orthonormal
from loralab.adapters.inits.quantize import fake_quantize
from loralab.adapters.inits.warm import filled
from loralab.adapters.targets import linear_weights
from loralab.errors import UserError

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class _FromReference:
    """reference: a model's name or directory, or a module: weights to compare the base's with."""

    reference: Any

    @cached_property
    def _weights(self) -> Mapping[str, Tensor]:
        model = self.reference
        if not isinstance(model, nn.Module):
            from loralab.models.load import load

            model, _ = load(model, "float32")
        return linear_weights(model)

    def _weight(self, context: Context) -> Tensor:
        """The reference's weight of a module, (out, in), fp32."""
        name = context.site.name
        if name not in self._weights:
            raise UserError(f"{context.scene.asked_by}: the reference has no linear module {name}")
        return self._weights[name].to(context.site.A.device, torch.float32)


@dataclass(frozen=True)
class SvdDelta(_FromReference):
    """The nearest rank-r matrix to a given change of W: a reference fine-tune minus the base.

    Figures: `energy`, the share of ||dW||_F^2 that the rank keeps, for each module.
    """

    facts: ClassVar = Facts(
        formula="s·BA = the r largest singular triples of W_ref − W",
        source="Eckart & Young 1936; LoRA extraction as in mergekit",
        unchanged="no: it is near the reference",
        cost="an SVD a module",
        needs="a reference model of the same shape",
        needs_plain=True,
    )

    def __call__(
        self, weight: Tensor, rank: int, generator: Generator, context: Context
    ) -> LoraInit:
        delta = self._weight(context) - weight
        a, b, energy = low_rank_delta(delta, rank)
        even = sqrt(context.scaling)
        return LoraInit(*filled(a / even, b / even, rank, generator), figures={"energy": energy})


@dataclass(frozen=True)
class OutputMatch:
    """Both factors non-zero, the adapter's output near zero on typical inputs.

    method "null_space": the rows of A are the r directions in which the inputs vary least (the
        last eigenvectors of C = E[x x^T]), B is random: A x is small, and so is what B learns from.
    method "gradient": A and B random, then `steps` of gradient descent on E||B A x||^2, which is
        tr(B A C A^T B^T), each factor put back to its Frobenius norm after each step: A x need not
        vanish if B maps it to little.
    The rows of A have norm 1/sqrt(3), those of PEFT's random A.
    b_scale multiplies the usual size of B. Figures, by module and for their mean: `residual_fit`
    and `residual_held_out`, sqrt(E||s B A x||^2 / E||W x||^2) on the text fitted and on held-out.
    """

    facts: ClassVar = Facts(
        formula="min E‖BAx‖² with ‖A‖, ‖B‖ fixed: A in the null space of E[xxᵀ], or by descent",
        source="this project; null-space projections as in AlphaEdit, arXiv:2410.02355",
        unchanged="nearly, on text like the calibration text",
        cost="one pass over the text, an eigendecomposition for each input",
        needs="calibration text",
        needs_plain=True,
    )
    method: Literal["null_space", "gradient"] = "null_space"
    steps: Count = 100
    b_scale: Positive = 1.0

    def __call__(
        self, weight: Tensor, rank: int, generator: Generator, context: Context
    ) -> LoraInit:
        name, scene = context.site.name, context.scene
        d_out, d_in = weight.shape
        b = self.b_scale * kaiming(d_out, rank, generator).to(weight.device)
        if self.method == "null_space":
            if rank > d_in:
                raise UserError(f"output_match: {name} has {d_in} inputs, the rank is {rank}")
            # Rotated, so that no single row is the quietest.
            rotation = orthonormal(rank, rank, generator).to(weight.device)
            a = rotation @ scene.moments.eigen(name)[1][:, :rank].T / sqrt(3)
        else:
            a = kaiming(rank, d_in, generator).to(weight.device)
            a, b = _descend(a, b, scene.moments.of(name), self.steps)
        change = context.scaling * b @ a
        figures = {
            label: moments.size(name, change) / max(moments.size(name, weight), 1e-30)
            for label, moments in (
                ("residual_fit", scene.moments),
                ("residual_held_out", scene.held_out_moments),
            )
        }
        return LoraInit(a, b, figures=figures)


def _descend(a: Tensor, b: Tensor, c: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Projected gradient descent on tr(B A C A^T B^T) from A (r, in), B (out, r); C (in, in)."""
    size_a, size_b = a.norm(), b.norm()
    for step in range(steps):
        # Relative steps that shrink: the curvature along the inputs spans many decades.
        rate = 0.3 * (1 - step / steps)
        ac, bb = a @ c, b.T @ b
        gradient_a, gradient_b = bb @ ac, b @ (ac @ a.T)
        a = a - rate * size_a * gradient_a / gradient_a.norm().clamp_min(1e-30)
        b = b - rate * size_b * gradient_b / gradient_b.norm().clamp_min(1e-30)
        a, b = a * (size_a / a.norm()), b * (size_b / b.norm())
    return a, b


@dataclass(frozen=True)
class QuantizationMatch(_FromReference):
    """The adapter that best undoes what quantisation does to the outputs on typical inputs.

    reference: the model before quantisation. The minimum of E||(W - Q - s B A) x||^2 at rank r is
    in closed form: the SVD of (W - Q) C^(1/2) cut to r, times C^(-1/2), with C = E[x x^T].
    Figures, by module and for their mean: `left_fit`, `left_held_out`, the share of the output
    error that remains.
    """

    facts: ClassVar = Facts(
        formula="min E‖(W − Q − s·BA)x‖²: SVD of (W−Q)C^½, times C^−½",
        source="QERA, arXiv:2410.06040 (exact); LQER, arXiv:2402.02446",
        unchanged="no: nearer to the unquantised model",
        cost="one pass over the text, an eigendecomposition and an SVD a module",
        needs="calibration text, the unquantised model",
        needs_plain=True,
    )

    def __call__(
        self, weight: Tensor, rank: int, generator: Generator, context: Context
    ) -> LoraInit:
        name, scene = context.site.name, context.scene
        error = self._weight(context) - weight
        values, vectors = scene.moments.eigen(name)
        # A floor under the spectrum: directions the text never used count a little, not nothing.
        roots = (values + 1e-4 * values.mean() + 1e-30).sqrt()
        u, singular, vt = torch.linalg.svd((error @ vectors) * roots, full_matrices=False)
        share = (singular[:rank] / context.scaling).sqrt()
        b = u[:, :rank] * share
        a = (share[:, None] * vt[:rank] / roots) @ vectors.T
        left = error - context.scaling * b @ a
        figures = {
            label: moments.size(name, left) / max(moments.size(name, error), 1e-30)
            for label, moments in (
                ("left_fit", scene.moments),
                ("left_held_out", scene.held_out_moments),
            )
        }
        return LoraInit(*filled(a, b, rank, generator), figures=figures)


@dataclass(frozen=True)
class LoftQ(_FromReference):
    """Quantised weight and adapter together nearest to W, whatever the inputs.

    On a full-precision base W becomes Q = quantise(W - s B A) and s B A = SVD_r(W - Q), in turns;
    the base is replaced, to be stored quantised. On an nf4 or int8 base, which stays as it is, one
    such step: s B A = SVD_r(W - Q), with W from `reference`. PEFT's own needs a GPU; this does not.
    Figures: `left`, ||W - Q - s B A||_F / ||W - Q||_F.
    """

    facts: ClassVar = Facts(
        formula="min ‖W − Q − s·BA‖_F, Q = quantise(W − s·BA), alternating",
        source="LoftQ, Li et al. 2023, arXiv:2310.08659",
        unchanged="no: nearer to the unquantised model than its quantisation",
        cost="`iterations` SVDs a module",
        needs="on a quantised base, the unquantised model",
        changes_base=True,
    )
    reference: Any = None
    bits: Literal[4, 8] = 4
    iterations: Count = 5

    def __call__(
        self, weight: Tensor, rank: int, generator: Generator, context: Context
    ) -> LoraInit:
        quantized = context.site.quantized is not None
        if quantized and self.reference is None:
            raise UserError(
                "loftq on a quantised base needs the model as it was before: "
                "options.reference=NAME or directory"
            )
        wanted = self._weight(context) if quantized else weight
        q = weight if quantized else fake_quantize(weight, self.bits)
        a, b, _ = low_rank_delta(wanted - q, rank)
        for _ in range(0 if quantized else self.iterations - 1):
            q = fake_quantize(wanted - b @ a, self.bits)
            a, b, _ = low_rank_delta(wanted - q, rank)
        left = float((wanted - q - b @ a).norm() / (wanted - q).norm().clamp_min(1e-30))
        even = sqrt(context.scaling)
        correction = None if quantized else q - weight
        return LoraInit(a / even, b / even, correction, {"left": left})
