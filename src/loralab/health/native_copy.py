"""A model as the native engine runs it: a Llama-like one in bf16 on the CPU, copied once.

Its adapter is two factors, loaded anew at each look, and nothing else is trained. Several times as
fast as the model itself; it and its base run through the same kernels, and of a prompt that rows
share whole pages run once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from loralab.adapters.extract import state_of
from loralab.adapters.state import AdapterState
from loralab.engines.backend import BASE
from loralab.engines.batched import BatchedEngine
from loralab.engines.memory import available_memory
from loralab.engines.native.pages import PAGE
from loralab.errors import UserError
from loralab.health.forced import Row
from loralab.health.greedy import Completion, generated
from loralab.health.runners import Seen, by_prompt
from loralab.health.still import base_of

if TYPE_CHECKING:
    from loralab.engines.native.backend import NativeBackend

_log = logging.getLogger(__name__)
_ADAPTER = "looked at"
_SHARE = 1 / 4
"""Of the free memory that a copy of the weights may take."""
_STEP = 512
"""Tokens of one native step."""
_LOGITS = 2**23 - 2**16
"""Logits of one batch: 32 MB, of which glibc hands out the same memory again. More is paged in anew
each time, which takes as long as making them."""


class NativeCopy:
    """A model's true base in the native engine, beside which its adapter is loaded at each look."""

    def __init__(self, model: Any, causal: Any, tokenizer: Any, state: AdapterState) -> None:
        """Raises UserError where the native engine cannot run the model or such an adapter."""
        with base_of(model), _bare(causal):
            self._engine = BatchedEngine(causal, tokenizer, backend="native")
        self.load(state)
        backend = cast("NativeBackend", self._engine.backend)
        self.base = NativeRunner(backend, BASE)
        self.adapted = NativeRunner(backend, 0)

    def load(self, state: AdapterState) -> None:
        """The adapter as it now is, on the same layers as the first."""
        self._engine.load({_ADAPTER: state})

    def complete(
        self, requests: Sequence[Any], max_new_tokens: int, base: bool
    ) -> tuple[Completion, ...]:
        """What the base answers, or the base with the adapter that was loaded last."""
        return generated(self._engine, requests, None if base else _ADAPTER, max_new_tokens)


class NativeRunner:
    """Runs rows through the native kernels. member: of the loaded adapters, or BASE."""

    def __init__(self, backend: NativeBackend, member: int) -> None:
        self._backend, self._member = backend, member

    def batches(self, rows: Sequence[Row]) -> list[list[int]]:
        """Rows of one prompt together."""
        return by_prompt(rows, self._backend.vocabulary, _LOGITS)

    def run(self, batch: Sequence[Row]) -> Seen:
        """Logits in float32."""
        backend = self._backend
        backend.start()
        backend.reserve_positions(max(len(row.ids) for row in batch))
        pages: list[list[int]] = []
        work: list[tuple[int, int]] = []
        wanted: list[bool] = []
        place: dict[tuple[int, int], int] = {}
        lasts: dict[tuple[int, ...], tuple[int, int]] = {}
        for at, row in enumerate(batch):
            own: list[int] = []
            # One more, since the pool keeps back the page that the last one is on.
            done = backend.pool.take_prefix(self._member, (*row.prompt_ids, -1), own)
            # A prompt's last token says the same to every row of it, so it is asked of one; to run
            # it again on a shared page writes there what stands there.
            begin = done if row.prompt_ids in lasts else min(done, row.start - 1)
            # The last token of a row predicts nothing that is asked for.
            stop = len(row.ids) - 1
            own += (backend.pool.take() for _ in range(-(-stop // PAGE) - len(own)))
            pages.append(own)
            lasts.setdefault(row.prompt_ids, (at, row.start - 1))
            for position in range(begin, stop):
                last = lasts[row.prompt_ids] == (at, position)
                if last or position >= row.start:
                    place[at, position] = len(place)
                wanted.append(last or position >= row.start)
                work.append((at, position))
        logits = self._forward(batch, pages, work, np.array(wanted))
        order = [
            place[key]
            for at, row in enumerate(batch)
            for key in (
                lasts[row.prompt_ids],
                *((at, position) for position in range(row.start, len(row.ids) - 1)),
            )
        ]
        return Seen(logits if order == list(range(len(logits))) else logits[torch.tensor(order)])

    def _forward(
        self,
        batch: Sequence[Row],
        pages: Sequence[Sequence[int]],
        work: Sequence[tuple[int, int]],
        wanted: np.ndarray[Any, np.dtype[np.bool_]],
    ) -> Tensor:
        """Logits of the wanted ones of (row, position)."""
        backend = self._backend
        table = np.zeros((len(batch), max(map(len, pages))), dtype=np.int32)
        for at, own in enumerate(pages):
            table[at, : len(own)] = own
        of, positions = np.array(work, dtype=np.int32).T.copy()
        tokens = np.array([batch[at].ids[position] for at, position in work], dtype=np.int32)
        made = []
        for begin in range(0, len(work), _STEP):
            part = slice(begin, begin + _STEP)
            step = backend.forward(
                tokens[part],
                positions[part],
                of[part],
                np.full(len(tokens[part]), self._member, np.int32),
                table,
                np.flatnonzero(wanted[part]).astype(np.int32),
                True,
            )
            assert step.logits is not None
            made.append(step.logits)
        return torch.cat(made) if len(made) > 1 else made[0]


def native_copy(model: Any, causal: Any, tokenizer: Any) -> NativeCopy | None:
    """A copy where the native engine runs the model, its adapter is plain LoRA, and memory is
    there."""
    weight = causal.get_input_embeddings().weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    size = sum(p.numel() * p.element_size() for p in causal.parameters())
    state = plain_adapter(model, causal)
    if state is None or size > _SHARE * available_memory():
        return None
    try:
        return NativeCopy(model, causal, tokenizer, state)
    except (UserError, AttributeError, KeyError) as error:
        _log.debug("no native copy: %s", error)
        return None


def plain_adapter(model: Any, causal: Any) -> AdapterState | None:
    """The one active adapter, where it is all by which the model differs from its true base."""
    active = getattr(model, "active_adapters", None)
    if not isinstance(active, list) or len(active) != 1 or not hasattr(model, "peft_config"):
        return None
    name = active[0]
    for module in causal.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return None
        if isinstance(module, BaseTunerLayer) and (module.merged or module.disable_adapters):
            return None
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            return None
    others = (n for n, p in causal.named_parameters() if p.requires_grad and "lora_" not in n)
    if any(others) or getattr(model.peft_config[name], "bias", "none") != "none":
        return None
    try:
        return state_of(model, name)
    except UserError:
        return None


@contextmanager
def _bare(causal: nn.Module) -> Iterator[None]:
    """The model with its own layers where adapters stand around them."""
    places = []
    for name, layer in causal.named_modules():
        if isinstance(layer, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            places.append((causal.get_submodule(parent)._modules, leaf, layer))
    for slots, leaf, layer in places:
        slots[leaf] = layer.get_base_layer()
    try:
        yield
    finally:
        for slots, leaf, layer in places:
            slots[leaf] = layer
