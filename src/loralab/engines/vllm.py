"""vLLM in this process: members go in as files, prompts as our own ids, rows end by our rules.

Scheduling, memory and kernels are vLLM's. What makes two engines comparable stays ours: how a
prompt becomes tokens, when a completion ends, what its text is, and which errors are whose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.state import AdapterState
from loralab.engines.base import Completion, Progress, Request
from loralab.engines.served import Finite, ServedModel, named, refuse_base_changes
from loralab.engines.stopping import Row
from loralab.engines.vllm_flight import Flight, first_line
from loralab.engines.vllm_members import MemberPlaces, allowed_rank
from loralab.engines.vllm_start import Options, device_name, import_vllm, start
from loralab.errors import UserError
from loralab.models.load import DTYPES, locate

HOTTEST = 2.0
"""The highest temperature that vLLM samples at."""


class VllmEngine:
    """Generates for any mix of loaded LoRA adapters over a model that vLLM runs.

    model: "smollm2", a directory, a .gguf file or a hub name. dtype: "bfloat16" or "float32".

    At most `options.max_loras` members are in vLLM at once: the requests of the next one enter when
    those of another are done. Every load has names and ids of its own and every call starts with
    an empty prefix cache, so that text depends on the requests of a call and on nothing before it.

    Errors that a user can mend are UserError; whatever concerns one request alone comes back as a
    Completion with finish_reason "error".

    >>> engine = VllmEngine("smollm2", "bfloat16", Options(max_loras=32))
    >>> engine.load({"a": state_a, "b": state_b})
    >>> engine.generate([Request("Once upon", "a"), Request("Once upon", "b")])
    """

    accepts: frozenset[str] = frozenset({"lora"})

    def __init__(self, model: str, dtype: str = "bfloat16", options: Options | None = None) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; expected {' or '.join(map(repr, DTYPES))}")
        options = options or Options()
        self._rank = allowed_rank(options.max_rank)
        vllm = import_vllm()
        source = locate(model, DTYPES[dtype])
        self._model = _described(model, source, DTYPES[dtype])
        llm = start(vllm, source, dtype, options)
        # vLLM's own, which the memory for its cache may have cut.
        self._model = replace(self._model, context=llm.model_config.max_model_len)
        self._core: Any = llm.llm_engine
        self._places = MemberPlaces(self._core, options.max_loras)
        self._sick: dict[str, str] = {}
        shared = f"{options.tensor_parallel} x " if options.tensor_parallel > 1 else ""
        self.kernel = f"vllm {vllm.__version__} {dtype} on {shared}{device_name()}"

    def load(self, adapters: Mapping[str, AdapterState]) -> None:
        """Replace the loaded adapters. Raises UserError, before anything changes, for one that
        this engine cannot run; one that holds NaN fails its own requests alone."""
        for name, state in adapters.items():
            if state.kind not in self.accepts:
                raise UserError(
                    f"adapter {name!r} is of kind {state.kind!r}: vLLM runs "
                    f"{', '.join(sorted(self.accepts))} only"
                )
            self._model.check(name, state)
            if state.rank > self._rank:
                raise UserError(
                    f"adapter {name!r} has rank {state.rank}: this engine was started for ranks "
                    f"up to {self._rank}; start it with a larger max_rank"
                )
        finite = Finite(self._model.dtype)
        complaints = {name: finite.complaint(state) for name, state in adapters.items()}
        self._places.load(adapters)
        self._sick = {name: why for name, why in complaints.items() if why is not None}

    def set_base(self, changes: Mapping[str, Tensor]) -> None:
        """Nothing: the base stays as it was loaded. Raises UserError where it should move."""
        refuse_base_changes("vllm", changes)

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[Completion]:
        """Completions in the order of the requests.

        Raises:
            UserError: an adapter is not loaded, or a temperature is over 2. Whatever else is
                raised on the way, KeyboardInterrupt and what `progress` raises with it, takes the
                requests in flight out of vLLM, which is ready for the next call.
        """
        for request in requests:
            if request.adapter is not None and request.adapter not in self._places.states:
                known = ", ".join(list(self._places.states)[:8]) or "none"
                raise UserError(
                    f"adapter {request.adapter!r} is not loaded (loaded: {known}): call load first"
                )
            if request.sampling.temperature > HOTTEST:
                raise UserError(
                    f"temperature is {request.sampling.temperature:g}: vLLM samples at "
                    f"{HOTTEST:g} at most; lower generation.temperature or use engine.name: batched"
                )
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        adapters = [request.adapter for request in requests]
        self._core.reset_prefix_cache()
        decoder = self._model.decoder
        Flight(self._core, self._places, decoder, rows, adapters, progress).finish()
        return [named(row, request) for row, request in zip(rows, requests, strict=True)]

    def close(self) -> None:
        """Give back vLLM's memory and remove every file."""
        self._places.close()
        self._core.engine_core.shutdown()

    def _row(self, index: int, request: Request) -> Row:
        row = self._model.row(index, request)
        if request.adapter in self._sick and row.completion is None:
            row.fail(self._sick[request.adapter])
        return row


def _described(name: str, source: str, dtype: torch.dtype) -> ServedModel:
    """The model's modules and what its tokens mean, without its weights. Raises UserError."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r}: {first_line(error)}") from error
    with suppress(OSError):  # a model without one ends where its config says
        model.generation_config = GenerationConfig.from_pretrained(source)
    return ServedModel.of(name, model, tokenizer)
