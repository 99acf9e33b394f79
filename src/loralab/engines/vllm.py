"""vLLM in this process: members go in as files, prompts as our own ids, rows end by our rules.

Scheduling, memory and kernels are vLLM's. What makes two engines comparable stays ours: how a
prompt becomes tokens, when a completion ends, what its text is, and which errors are whose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.state import AdapterState
from loralab.adapters.targets import linear_weights
from loralab.engines.backend import BASE
from loralab.engines.base import Completion, Progress, Request
from loralab.engines.prompts import PromptEncoder
from loralab.engines.stopping import Decoder, Row, end_tokens
from loralab.engines.vllm_flight import Flight, first_line
from loralab.engines.vllm_members import Finite, MemberPlaces, allowed_rank, check_shapes
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
        from transformers import AutoTokenizer

        self._options = options or Options()
        self._rank = allowed_rank(self._options.max_rank)
        vllm = import_vllm()
        self._dtype = DTYPES[dtype]
        source = locate(model, self._dtype)
        config, generation, self._shapes = _described(source)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self._encoder = PromptEncoder(self.tokenizer)
        ends = end_tokens(SimpleNamespace(config=config, generation_config=generation),
                          self.tokenizer)  # fmt: skip
        self._decoder = Decoder(self.tokenizer, ends)
        self._llm: Any = start(vllm, source, dtype, self._options)
        self.context: int = self._llm.model_config.max_model_len
        shared = self._options.tensor_parallel
        self.kernel = f"vllm {vllm.__version__} {dtype} on {f'{shared} x ' * (shared > 1)}" + (
            device_name()
        )
        self._core = self._llm.llm_engine
        self._places = MemberPlaces(self._core, self._options.max_loras)
        self._sick: dict[str, str] = {}

    def load(self, adapters: Mapping[str, AdapterState]) -> None:
        """Replace the loaded adapters. Raises UserError, before anything changes, for one that
        this engine cannot run; one that holds NaN fails its own requests alone."""
        for name, state in adapters.items():
            if state.kind not in self.accepts:
                raise UserError(
                    f"adapter {name!r} is of kind {state.kind!r}: vLLM runs "
                    f"{', '.join(sorted(self.accepts))} only"
                )
            check_shapes(name, state, self._shapes, self._rank)
        finite = Finite(self._dtype)
        complaints = {name: finite.complaint(state) for name, state in adapters.items()}
        self._places.load(adapters)
        self._sick = {name: why for name, why in complaints.items() if why is not None}

    def set_base(self, changes: Mapping[str, Tensor]) -> None:
        """Nothing: the base stays as it was loaded. Raises UserError where it should move."""
        if changes:
            raise UserError(
                f"engine vllm cannot move base weights ({len(changes)} modules asked for): with "
                "evolution.noise_on: weights, or a start that takes a part out of W such as "
                "pissa, use engine.name: batched"
            )

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
        self._core.reset_prefix_cache()
        adapters = [request.adapter for request in requests]
        Flight(self._core, self._places, self._decoder, rows, adapters, progress).finish()
        return [_named(row, request) for row, request in zip(rows, requests, strict=True)]

    def close(self) -> None:
        """Give back vLLM's memory and remove every file."""
        self._places.close()
        self._core.engine_core.shutdown()

    def _row(self, index: int, request: Request) -> Row:
        prompt = self._encoder.encode(request.prompt)
        limit = min(request.sampling.max_new_tokens, self.context - len(prompt))
        row = Row(index, prompt, BASE, limit, request.sampling, self._decoder)
        if request.adapter in self._sick:
            row.fail(self._sick[request.adapter])
        elif not prompt:
            row.fail("the prompt is empty and the tokenizer has no beginning-of-sequence token")
        elif limit < 1:
            row.fail(
                f"the prompt has {len(prompt)} tokens, which leaves no room in the context of "
                f"{self.context}: shorten it"
            )
        return row


def _described(source: str) -> tuple[Any, Any, dict[str, tuple[int, ...]]]:
    """Config, generation config (None without one), and (out, in) of the linear modules."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(f"model {source!r}: {first_line(error)}") from error
    shapes = {name: tuple(weight.shape) for name, weight in linear_weights(model).items()}
    try:
        return config, GenerationConfig.from_pretrained(source), shapes
    except OSError:
        return config, None, shapes


def _named(row: Row, request: Request) -> Completion:
    """The row's completion, an error with the adapter's name before it."""
    done = row.completion
    assert done is not None
    if done.error is None:
        return done
    owner = "base model" if request.adapter is None else f"adapter {request.adapter!r}"
    return Completion(done.text, done.tokens, done.finish_reason, f"{owner}: {done.error}")
