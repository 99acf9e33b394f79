"""What a driver knows of a model that runs in a server: how to ask it, and what its ids mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loralab.adapters.state import AdapterState, Factors
from loralab.adapters.targets import linear_weights
from loralab.engines.backend import BASE
from loralab.engines.base import Completion, Request
from loralab.engines.prompts import PromptEncoder
from loralab.engines.stopping import Decoder, Row, end_tokens
from loralab.errors import UserError

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that servers run as one: an adapter on one of them must name all."""


@dataclass(frozen=True)
class ServedModel:
    """name, kind (Transformers' model_type) and dtype of a model; its context in tokens, None where
    it has no limit; shapes: (out, in) of its linear modules but the head."""

    name: str
    kind: str
    dtype: torch.dtype
    context: int | None
    shapes: Mapping[str, tuple[int, int]]
    encoder: PromptEncoder
    decoder: Decoder

    @staticmethod
    def of(name: str, model: Any, tokenizer: Any) -> ServedModel:
        """From the model itself, which is not kept."""
        config = model.config.get_text_config(decoder=True)
        shapes = {n: (w.shape[0], w.shape[1]) for n, w in linear_weights(model).items()}
        return ServedModel(
            name,
            model.config.model_type,
            model.dtype,
            getattr(config, "max_position_embeddings", None),
            shapes,
            PromptEncoder(tokenizer),
            Decoder(tokenizer, end_tokens(model, tokenizer)),
        )

    def row(self, index: int, request: Request) -> Row:
        """A request on its way; with its error already if it cannot be run."""
        prompt = self.encoder.encode(request.prompt)
        limit = request.sampling.max_new_tokens
        if self.context is not None:
            limit = min(limit, self.context - len(prompt))
        row = Row(index, prompt, BASE, limit, request.sampling, self.decoder)
        if not prompt:
            row.fail("the prompt is empty and the tokenizer has no beginning-of-sequence token")
        elif limit < 1:
            row.fail(
                f"the prompt has {len(prompt)} tokens, which leaves no room in the model's "
                f"context of {self.context}: shorten it"
            )
        return row

    def check(self, name: str, state: AdapterState) -> None:
        """Raise UserError unless each factor fits a linear module of the model."""
        if not state.factors:
            raise UserError(f"adapter {name!r} has no factors: ask the base model instead")
        for module, (a, b) in state.factors.items():
            if module not in self.shapes:
                raise UserError(f"adapter {name!r}: {module!r} is no linear module of {self.name}")
            if (b.shape[0], a.shape[1]) != self.shapes[module]:
                raise UserError(
                    f"adapter {name!r}: {module} is {b.shape[0]} x {a.shape[1]}; that of "
                    f"{self.name} is {' x '.join(map(str, self.shapes[module]))}"
                )

    def uniform(self, state: AdapterState) -> AdapterState:
        """The same change of the weights with one rank everywhere and no fused module in part.

        Rows of zeros are added to A and columns of zeros to B; modules left alone beside a fused
        one get factors of zeros. What PEFT says beside the factors is left out.
        """
        rank = state.rank
        factors = {
            name: Factors(
                pad(f.A, (0, 0, 0, rank - f.A.shape[0])), pad(f.B, (0, rank - f.B.shape[1]))
            )
            for name, f in state.factors.items()
        }
        for name in list(factors):
            a, b = factors[name]
            for sibling in siblings(name):
                if sibling in self.shapes and sibling not in factors:
                    factors[sibling] = Factors(
                        torch.zeros_like(a), b.new_zeros(self.shapes[sibling][0], rank)
                    )
        return replace(state, factors=factors, extra={})


def siblings(module: str) -> list[str]:
    """The modules that a server fuses with this one."""
    parent, _, leaf = module.rpartition(".")
    group = next((group for group in FUSED if leaf in group), ())
    return [f"{parent}.{other}" if parent else other for other in group if other != leaf]


class Finite:
    """Finds numbers that a dtype cannot hold; a tensor that members share is looked at once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._limit = torch.finfo(dtype).max
        self._sound: dict[int, bool] = {}

    def complaint(self, state: AdapterState) -> str | None:
        """What is wrong with the factors; None if nothing."""
        for module, factors in state.factors.items():
            for part, tensor in zip("AB", factors, strict=True):
                if not self._is_sound(tensor):
                    return f"{part} of {module} holds NaN or a number that is not finite"
        return None

    def _is_sound(self, tensor: Tensor) -> bool:
        if id(tensor) not in self._sound:
            # No comparison holds of NaN, and among numbers with a NaN the largest is NaN.
            self._sound[id(tensor)] = not tensor.numel() or bool(tensor.abs().max() <= self._limit)
        return self._sound[id(tensor)]


def named(row: Row, request: Request) -> Completion:
    """The row's completion, an error with the adapter's name before it."""
    done = row.completion
    assert done is not None
    if done.error is None:
        return done
    owner = "base model" if request.adapter is None else f"adapter {request.adapter!r}"
    return Completion(done.text, done.tokens, done.finish_reason, f"{owner}: {done.error}")


def refuse_base_changes(engine: str, changes: Mapping[str, Tensor]) -> None:
    """For `set_base` of an engine whose base stays as it was loaded.

    Raises:
        UserError: there are changes.
    """
    if changes:
        raise UserError(
            f"engine {engine} cannot move base weights ({len(changes)} modules asked for): with "
            "evolution.noise_on: weights, or a start that takes a part out of W such as "
            "pissa, use engine.name: batched"
        )
