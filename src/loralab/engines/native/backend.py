"""The native backend: Llama-like models in bf16 on a CPU, one native call per forward step.

Its result for a row depends neither on the other rows nor on the number of threads (see gemm.h),
so neither does a request's text. Prompts share the pages of the cache that hold a common prefix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loralab.adapters.state import AdapterState
from loralab.engines.backend import StepOutput
from loralab.engines.native.build import NativeUnavailableError, library
from loralab.engines.native.pages import PAGE, PagePool
from loralab.engines.native.session import NativeSession
from loralab.errors import UserError

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""A layer's products, in the order of `enum Module`."""
SITES = ((0, 1, 2), (3,), (4, 5), (6,))
"""Modules with the same input: their A products are computed together."""
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
RANK_MULTIPLE = 8


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.ctypes.data)


def _bf16(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.bfloat16).contiguous()


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


class NativeBackend:
    """Runs the decoder of a Transformers model with kernels of our own.

    model: a causal LM that `supports` accepts, in bf16 on the CPU. Its parameters are copied into
        packed form; the model itself is left untouched.
    threads: worker threads; None is torch's number.
    lib: the compiled kernels; None is the library built for this machine.
    """

    joins = True

    def __init__(
        self, model: nn.Module, threads: int | None = None, lib: ctypes.CDLL | None = None
    ) -> None:
        reason = self.supports(model)
        if reason:
            raise NativeUnavailableError(reason)
        self._lib = lib or library()
        self.threads = threads or torch.get_num_threads()
        self.name = f"native-bf16-{self._lib.ll_kernel().decode()}"
        self._model = model
        config: Any = model.config
        self._layers: list[nn.Module] = list(model.get_submodule("model.layers").children())
        attention: Any = self._layers[0].self_attn
        self.vocabulary = int(config.vocab_size)
        self._limit = int(config.max_position_embeddings)
        self._handle = self._lib.ll_new(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            config.vocab_size,
            self._limit,
            config.rms_norm_eps,
            attention.scaling,
        )
        self.page_bytes = int(self._lib.ll_page_bytes(self._handle))
        self.pool = PagePool(self.page_bytes)
        for index in range(len(self._layers)):
            self._set_layer(index)
        self._set_norm(0, 4, model.get_submodule("model.norm"))
        self._embedding = _bf16(model.get_parameter("model.embed_tokens.weight"))
        self._lib.ll_set_head(self._handle, _pointer(_bf16(model.get_parameter("lm_head.weight"))))
        self._positions = 0
        self.reserve_positions(min(self._limit, 2048))

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle:
            self._lib.ll_free(handle)
            self._handle = None

    @staticmethod
    def supports(model: nn.Module) -> str | None:
        """Why the model cannot run here, or None if it can."""
        config: Any = getattr(model, "config", None)
        kind = getattr(config, "model_type", None)
        if kind not in MODEL_TYPES:
            return f"model type {kind!r} is not one of {', '.join(MODEL_TYPES)}"
        weight = model.get_parameter("model.embed_tokens.weight")
        if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
            return f"weights are {weight.dtype} on {weight.device.type}, not bfloat16 on cpu"
        if config.hidden_act != "silu":
            return f"activation {config.hidden_act!r} is not silu"
        layers = model.get_submodule("model.layers")
        for name in MODULES:
            if not isinstance(layers[0].get_submodule(name), nn.Linear):  # type: ignore[index]
                return f"{name} is not a plain linear layer"
        for index, layer in enumerate(layers.children()):
            for name in MODULES:
                if not layer.get_submodule(name).weight.is_floating_point():  # type: ignore[operator]
                    return f"{name} of layer {index} is quantised"
        attention: Any = layers[0].self_attn  # type: ignore[index]
        if attention.head_dim % 16:
            return f"head size {attention.head_dim} is not a multiple of 16"
        for size in (config.hidden_size, config.intermediate_size):
            if size % 4:
                return f"layer width {size} is not a multiple of 4"
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
            return f"rotary type {rope['rope_type']!r} depends on the length"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "rotary positions cover only a part of each head"
        try:
            library()
        except NativeUnavailableError as error:
            return str(error)
        return None

    def _set_layer(self, index: int) -> None:
        layer: Any = self._layers[index]
        for which, module in enumerate(MODULES):
            linear: Any = layer.get_submodule(module)
            self._set_module(index, which, linear.weight, linear.bias)
        self._set_norm(index, 0, layer.input_layernorm)
        self._set_norm(index, 1, layer.post_attention_layernorm)
        for which, name in ((2, "q_norm"), (3, "k_norm")):
            if hasattr(layer.self_attn, name):
                self._set_norm(index, which, getattr(layer.self_attn, name))
        # Mistral keeps its window in the config alone, Qwen in the layers it holds for.
        config: Any = self._model.config
        owner = config if config.model_type == "mistral" else layer.self_attn
        window = getattr(owner, "sliding_window", None)
        self._lib.ll_set_window(self._handle, index, int(window or 0))

    def _set_module(self, layer: int, which: int, weight: Tensor, bias: Tensor | None) -> None:
        w = _bf16(weight)
        b = None if bias is None else _fp32(bias)
        self._lib.ll_set_module(
            self._handle, layer, which, _pointer(w), None if b is None else _pointer(b)
        )

    def _set_norm(self, layer: int, which: int, module: nn.Module) -> None:
        weight = _fp32(module.get_parameter("weight"))
        self._lib.ll_set_norm(self._handle, layer, which, _pointer(weight))

    def reserve_positions(self, positions: int) -> None:
        """Make the rotary tables reach this many positions."""
        if positions <= self._positions:
            return
        if positions > self._limit:
            raise ValueError(f"{positions} positions are more than the model's {self._limit}")
        self._positions = min(self._limit, max(positions, 2 * self._positions))
        rotary: Any = self._model.get_submodule("model.rotary_emb")
        with torch.inference_mode():
            ids = torch.arange(self._positions).unsqueeze(0)
            cos, sin = rotary(torch.zeros(1, dtype=torch.float32), ids)
        self._cos, self._sin = _fp32(cos[0]), _fp32(sin[0])
        self._lib.ll_set_tables(
            self._handle, _pointer(self._embedding), _pointer(self._cos), _pointer(self._sin)
        )

    def refresh_base(self, names: Sequence[str]) -> None:
        """Pack these modules of the model again: their weights have changed."""
        for name in names:
            layer, which = self._locate(name)
            linear: Any = self._model.get_submodule(name)
            self._set_module(layer, which, linear.weight, linear.bias)

    def _locate(self, name: str) -> tuple[int, int]:
        _, _, layer, module = name.split(".", 3)
        return int(layer), MODULES.index(module)

    def unknown_modules(self, names: Sequence[str]) -> list[str]:
        """Of these module names, those whose adapters this backend cannot run."""
        known = {f"model.layers.{i}.{m}" for i in range(len(self._layers)) for m in MODULES}
        return [n for n in names if n not in known]

    def load(self, adapters: Sequence[AdapterState]) -> None:
        """Pack the members' factors. Raises UserError for modules it cannot adapt."""
        names = sorted({name for a in adapters for name in a.factors})
        if unknown := self.unknown_modules(names):
            raise UserError(
                f"the native backend cannot adapt {unknown[0]!r}, only {', '.join(MODULES)} of "
                "this model's layers; is the adapter for another model? (backend: torch runs any)"
            )
        if not adapters:
            self._lib.ll_set_members(self._handle, 0, 0, 1.0)
            return
        # Members without factors (a base row each) leave rank at its least.
        rank = max((a.rank for a in adapters if a.factors), default=1)
        rank = (rank + RANK_MULTIPLE - 1) // RANK_MULTIPLE * RANK_MULTIPLE
        scalings = {a.scaling for a in adapters}
        # One scaling serves all; where they differ each is folded into its own B instead.
        common = scalings.pop() if len(scalings) == 1 else 1.0
        self._lib.ll_set_members(self._handle, len(adapters), rank, common)
        for layer in range(len(self._layers)):
            for site in SITES:
                self._load_site(adapters, layer, site, common)

    def _load_site(
        self,
        adapters: Sequence[AdapterState],
        layer: int,
        site: tuple[int, ...],
        common: float,
    ) -> None:
        names = {which: f"model.layers.{layer}.{MODULES[which]}" for which in site}
        shared = all(
            len({id(a.factors[n].A) if n in a.factors else None for a in adapters}) == 1
            for n in names.values()
        )
        count = len(adapters)
        for which, name in names.items():
            if not any(name in a.factors for a in adapters):
                continue
            a_pointers = (ctypes.c_void_p * count)()
            b_pointers = (ctypes.c_void_p * count)()
            ranks = (ctypes.c_int32 * count)()
            alive: list[Tensor] = []
            for i, adapter in enumerate(adapters):
                if name not in adapter.factors:
                    continue
                a, b = adapter.factors[name]
                if adapter.scaling != common:
                    b = b.float() * adapter.scaling
                b = _bf16(b)
                if i == 0 or not shared:
                    a = _bf16(a)
                    alive.append(a)
                    a_pointers[i] = _pointer(a)
                alive.append(b)
                b_pointers[i] = _pointer(b)
                ranks[i] = b.shape[1]
            self._lib.ll_set_lora(
                self._handle, layer, which, a_pointers, b_pointers, ranks, int(shared)
            )

    def start(self) -> NativeSession:
        """A new, empty session. It takes over the cache: rows of an earlier one are lost."""
        self.pool.clear()
        return NativeSession(self)

    def row_bytes(self, tokens: int) -> int:
        """Cache memory of one row of this many tokens, in bytes."""
        return (tokens + PAGE - 1) // PAGE * self.page_bytes

    def forward(
        self,
        tokens: np.ndarray[Any, Any],
        positions: np.ndarray[Any, Any],
        sequence: np.ndarray[Any, Any],
        member: np.ndarray[Any, Any],
        pages: np.ndarray[Any, Any],
        out_rows: np.ndarray[Any, Any],
        want_logits: bool,
    ) -> StepOutput:
        """One native step over T token rows, all arrays int32.

        pages: (sequences, n) page numbers; out_rows: (R,) rows whose logits are wanted, R >= 0.
        """
        count = len(out_rows)
        best = torch.empty(count, dtype=torch.int64)
        logits = torch.empty(count, self.vocabulary) if want_logits else None
        self._lib.ll_forward(
            self._handle,
            len(tokens),
            _address(tokens),
            _address(positions),
            _address(sequence),
            _address(member),
            _address(pages),
            pages.shape[1],
            self.pool.address,
            self.pool.capacity,
            count,
            _address(out_rows),
            None if logits is None else _pointer(logits),
            _pointer(best),
            self.threads,
        )
        return StepOutput(best, logits)
