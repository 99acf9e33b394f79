"""vLLM in this process: members go in as files, prompts as our own ids, rows end by our rules.

Scheduling, memory and kernels are vLLM's. What makes two engines comparable stays ours: how a
prompt becomes tokens, when a completion ends, what its text is, and which errors are whose.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.state import AdapterState
from loralab.adapters.targets import linear_weights
from loralab.engines.backend import BASE
from loralab.engines.base import Completion, Progress, Request, Sampling
from loralab.engines.prompts import PromptEncoder
from loralab.engines.stopping import Decoder, Row, end_tokens
from loralab.engines.vllm_members import Finite, MemberFiles, allowed_rank, check_shapes
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
        self._files = MemberFiles()
        self._states: dict[str, AdapterState] = {}
        self._sick: dict[str, str] = {}
        self._held: dict[str, Any] = {}
        self._asked = 0

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
        for name in list(self._held):
            self._let_go(name)
        self._states = dict(adapters)
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
            if request.adapter is not None and request.adapter not in self._states:
                known = ", ".join(list(self._states)[:8]) or "none"
                raise UserError(
                    f"adapter {request.adapter!r} is not loaded (loaded: {known}): call load first"
                )
            if request.sampling.temperature > HOTTEST:
                raise UserError(
                    f"temperature is {request.sampling.temperature:g}: vLLM samples at "
                    f"{HOTTEST:g} at most; lower generation.temperature or use engine.name: batched"
                )
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        self._llm.llm_engine.reset_prefix_cache()
        _Flight(self, rows, [request.adapter for request in requests], progress).finish()
        return [_named(row, request) for row, request in zip(rows, requests, strict=True)]

    def close(self) -> None:
        """Give back vLLM's memory and remove every file."""
        self._held, self._states = {}, {}
        self._files.close()
        self._llm.llm_engine.engine_core.shutdown()

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

    def _hold(self, name: str, busy: Mapping[str, int]) -> None:
        """Have vLLM hold a member, in place of one that no request in flight needs."""
        if name in self._held:
            return
        if len(self._held) >= self._options.max_loras:
            self._let_go(next(held for held in self._held if not busy[held]))
        from vllm.lora.request import LoRARequest

        number, folder = self._files.write(self._states[name])
        try:
            lora = LoRARequest(f"loralab-{number}", number, str(folder))
            self._llm.llm_engine.add_lora(lora)
            self._held[name] = lora
        finally:
            self._files.remove(folder)

    def _let_go(self, name: str) -> None:
        self._llm.llm_engine.remove_lora(self._held.pop(name).lora_int_id)

    def _add(self, row: Row, adapter: str | None) -> str:
        """Hand a row to vLLM; the id it goes by there."""
        from vllm.inputs import tokens_input

        self._asked += 1
        self._llm.llm_engine.add_request(
            str(self._asked),
            tokens_input(row.prompt),
            _parameters(row, self._decoder),
            lora_request=None if adapter is None else self._held[adapter],
        )
        return str(self._asked)


class _Flight:
    """One call of `generate`: members waiting for a place, and requests in vLLM."""

    def __init__(
        self,
        engine: VllmEngine,
        rows: Sequence[Row],
        adapters: Sequence[str | None],
        progress: Progress | None,
    ) -> None:
        self._engine = engine
        self._core = engine._llm.llm_engine
        groups: dict[str | None, list[Row]] = {}
        for row, adapter in zip(rows, adapters, strict=True):
            if row.completion is None:
                groups.setdefault(adapter, []).append(row)
        # The base needs no place: it need not wait for one.
        self._waiting = deque(sorted(groups.items(), key=lambda group: group[0] is not None))
        self._flying: dict[str, tuple[Row, str | None]] = {}
        self._busy: Counter[str] = Counter()
        self._total = len(rows)
        self._finished = sum(row.completion is not None for row in rows)
        self._progress = progress

    def finish(self) -> None:
        """Step vLLM until every row has its completion."""
        try:
            self._report()
            while self._waiting or self._flying:
                before = self._finished
                self._admit()
                for output in self._core.step():
                    self._take(output)
                if self._finished > before:
                    self._report()
        finally:
            self._core.abort_request(list(self._flying))

    def _admit(self) -> None:
        """Let members in as far as there are places."""
        while self._waiting:
            adapter, rows = self._waiting[0]
            if adapter is not None:
                if len(+self._busy) >= self._engine._options.max_loras:
                    return
                try:
                    self._engine._hold(adapter, self._busy)
                except ValueError as error:
                    for row in rows:
                        self._end(row, f"vLLM does not load it: {_first_line(error)}")
                    self._waiting.popleft()
                    continue
            self._waiting.popleft()
            for row in rows:
                self._let_in(row, adapter)

    def _let_in(self, row: Row, adapter: str | None) -> None:
        try:
            number = self._engine._add(row, adapter)
        except ValueError as error:
            self._end(row, f"vLLM refuses it: {_first_line(error)}")
            return
        self._flying[number] = row, adapter
        if adapter is not None:
            self._busy[adapter] += 1

    def _take(self, output: Any) -> None:
        """Tokens of one request, all of them or since the last step."""
        if output.request_id not in self._flying:
            return
        row, adapter = self._flying[output.request_id]
        made = output.outputs[0]
        if output.metrics is not None and output.metrics.is_corrupted:
            row.tokens.clear()  # which of them came before the NaN is not told
            row.fail("logits are NaN")
        for token in made.token_ids:
            if row.completion is None:
                row.accept(token)
        if row.completion is None and output.finished:
            row.fail(f"vLLM ended it after {len(row.tokens)} tokens: {made.finish_reason}")
        if row.completion is None:
            return
        if not output.finished:
            self._core.abort_request([output.request_id])
        del self._flying[output.request_id]
        if adapter is not None:
            self._busy[adapter] -= 1
        self._finished += 1

    def _end(self, row: Row, why: str) -> None:
        row.fail(why)
        self._finished += 1

    def _report(self) -> None:
        if self._progress is not None and self._finished:
            self._progress(self._finished, self._total)


def _parameters(row: Row, decoder: Decoder) -> Any:
    """vLLM's parameters of a row, which ends at our end tokens and at the strings we look for."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling: Sampling = row.sampling
    stops = any(sampling.stop)
    return SamplingParams(
        max_tokens=row.limit,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        # -1 would mean none; torch takes 64 bits.
        seed=sampling.seed % 2**63,
        stop_token_ids=sorted(decoder.ends_for(sampling.stop)),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if stops else RequestOutputKind.FINAL_ONLY,
    )


def _described(source: str) -> tuple[Any, Any, dict[str, tuple[int, ...]]]:
    """Config, generation config (None without one), and (out, in) of the linear modules."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(f"model {source!r}: {_first_line(error)}") from error
    shapes = {name: tuple(weight.shape) for name, weight in linear_weights(model).items()}
    try:
        return config, GenerationConfig.from_pretrained(source), shapes
    except OSError:
        return config, None, shapes


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _named(row: Row, request: Request) -> Completion:
    """The row's completion, an error with the adapter's name before it."""
    done = row.completion
    assert done is not None
    if done.error is None:
        return done
    owner = "base model" if request.adapter is None else f"adapter {request.adapter!r}"
    return Completion(done.text, done.tokens, done.finish_reason, f"{owner}: {done.error}")
