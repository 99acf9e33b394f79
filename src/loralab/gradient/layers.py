"""Fused forwards for a decoder's norms, gated MLPs and attention while it trains.

    with fused_layers(model) as report: ...

Modules of the classes in `NORMS`, `MLPS` and `ATTENTIONS` get a `forward` of their own
(`layer_functions.py`), on native kernels where those can be had. Projections inside them are
called as modules, so adapters, hooks and quantised weights work as before. What a call needs
beyond that (a cache, padding, dropout, a window shorter than a sequence) goes to the class's own
forward, call by call. Other classes are left alone, and `report` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from loralab.gradient import attention
from loralab.gradient.collate import LENGTHS
from loralab.gradient.layer_functions import RotaryAttention, rms_norm, swiglu
from loralab.gradient.native import attention as native_attention
from loralab.gradient.native import layers as native
from loralab.gradient.native.switch import wanted
from loralab.gradient.plain_layers import PlainLayers

_DECODER = "loralab.models.decoder"
_PLAIN = PlainLayers()


def _family(suffix: str, *names: str) -> frozenset[str]:
    return frozenset(
        f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}{suffix}"
        for name in names
    )


NORMS = _family("RMSNorm", "Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3") | {
    f"{_DECODER}.RMSNorm"
}
"""Classes that compute weight * (x / rms(x)), eps inside the root."""

MLPS = _family("MLP", "Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3") | {
    "loralab.models.moe.SwiGLU"
}
"""Classes that compute down(act(gate(x)) * up(x))."""

ATTENTIONS = _family("Attention", "Llama", "Mistral", "Qwen2", "Qwen3") | {f"{_DECODER}.Attention"}
"""Classes whose queries and keys are rotated, halves against each other, over the whole head."""


@dataclass(frozen=True)
class Report:
    """taken: how many modules of which class are fused. left: those that look like a norm, an
    MLP or attention and do not."""

    taken: Mapping[str, int]
    left: Mapping[str, int]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said to the user, if anything."""
        if not self.left:
            return ()
        left = ", ".join(f"{count} {name}" for name, count in self.left.items())
        return (f"not known to the fast step and left as they are: {left}",)


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[Report]:
    """Within it the model's known layers are fused."""
    taken, left, patched = dict[str, int](), dict[str, int](), list[nn.Module]()
    for module in model.modules():
        forward = _forward_of(module)
        known = forward is not None and "forward" not in vars(module)
        name = type(module).__name__
        if known:
            module.forward = MethodType(forward, module)  # type: ignore[arg-type]
            patched.append(module)
        if known or name.endswith(("Norm", "MLP", "Attention")):
            counts = taken if known else left
            counts[name] = counts.get(name, 0) + 1
    try:
        yield Report(taken, left)
    finally:
        for module in patched:
            vars(module).pop("forward", None)


def _forward_of(module: nn.Module) -> Callable[..., Any] | None:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind in NORMS:
        return _norm
    if kind in MLPS:
        act = getattr(module, "act_fn", None)
        silu = act is None or type(act).__name__ in ("SiLU", "SiLUActivation")
        return _mlp if silu else None
    if kind in ATTENTIONS:
        return _decoder_attention if kind.startswith(_DECODER) else _attention
    return None


def _kernels(width: int, *tensors: Tensor) -> native.LayerKernels | None:
    fits = wanted() and width % native.LANES == 0 and native.takes(*tensors)
    return native.kernels() if fits else None


def _norm(self: Any, x: Tensor) -> Tensor:
    if x.dtype != self.weight.dtype or torch.compiler.is_compiling():
        plain: Tensor = type(self).forward(self, x)
        return plain
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    layers = _kernels(x.shape[-1], x, self.weight) or _PLAIN
    return rms_norm(layers, x, self.weight, eps)


def _mlp(self: Any, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        plain: Tensor = type(self).forward(self, x)
        return plain
    gate, up = self.gate_proj(x), self.up_proj(x)
    layers = _kernels(gate.shape[-1], gate, up) or _PLAIN
    out: Tensor = self.down_proj(swiglu(layers, gate, up))
    return out


def _attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
    lengths = _lengths(self, kwargs, past_key_values, window)
    # Rotary positions over a part of the head alone are the class's own affair.
    whole = position_embeddings is not None and position_embeddings[0].shape[-1] == self.head_dim
    if position_embeddings is None or not whole or lengths is None:
        return type(self).forward(
            self,
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    parts = [
        project(hidden_states).unflatten(-1, (-1, self.head_dim))
        for project in (self.q_proj, self.k_proj, self.v_proj)
    ]
    for at, norm in enumerate(("q_norm", "k_norm")):
        if hasattr(self, norm):
            parts[at] = getattr(self, norm)(parts[at])
    out = _attend(self, parts, position_embeddings, lengths)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def _decoder_attention(
    self: Any,
    x: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    attention_mask: Tensor | None,
    past_key_values: Any,
    **kwargs: Any,
) -> Tensor:
    lengths = _lengths(self, kwargs, past_key_values, None)
    if rotation is None or lengths is None:
        plain: Tensor = type(self).forward(
            self, x, rotation, attention_mask, past_key_values, **kwargs
        )
        return plain
    parts = [part.transpose(1, 2) for part in self.project(x)]
    out = _attend(self, parts, rotation, lengths).reshape(*x.shape[:-1], -1)
    projected: Tensor = self.out_proj(out) if self.config.attention == "fused" else self.o_proj(out)
    return projected


def _lengths(
    module: Any, kwargs: Mapping[str, Any], past_key_values: Any, window: int | None
) -> Sequence[int] | None:
    """Of a call with sequences end to end; None if it asks for more than their attention."""
    lengths: Sequence[int] | None = kwargs.get(LENGTHS)
    beyond = (
        past_key_values is not None
        or module.config._attn_implementation != attention.NAME
        or (module.training and getattr(module, "attention_dropout", 0.0))
        or (lengths and window is not None and max(lengths) > window)
    )
    return None if beyond else lengths


def _attend(
    module: Any, parts: Sequence[Tensor], rotation: tuple[Tensor, Tensor], lengths: Sequence[int]
) -> Tensor:
    """(1, tokens, heads, d) of queries, keys and values (1, tokens, heads or key heads, d)."""
    from loralab.models.rope import rotate

    width = parts[0].shape[-1]
    q, k, v = (part[0].contiguous() for part in parts)
    layers, kernel = _kernels(width // 2, q, k, v), native_attention.kernel()
    one_row = rotation[0].shape[0] == 1
    if layers is None or kernel is None or not (one_row and kernel.takes(q, k, v)):
        turned = [rotate(part.transpose(1, 2), *rotation) for part in parts[:2]]
        return attention.sequence_attention(
            module,
            turned[0],
            turned[1],
            parts[2].transpose(1, 2),
            None,
            scaling=module.scaling,
            sequence_lengths=lengths,
        )[0]
    tables = (t[0, :, : width // 2].float().contiguous() for t in rotation)
    out: Tensor = RotaryAttention.apply(  # type: ignore[no-untyped-call]
        layers, kernel, q, k, v, *tables, module.scaling, tuple(lengths)
    )
    return out[None]
