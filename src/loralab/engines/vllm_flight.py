"""Requests on their way through vLLM: members let in as places come free, rows ended by our rules.

A row whose logits hold NaN runs once more with its own member alone. NaN stays behind in the blocks
of the key-value cache, and on a CPU the next row in such a block has NaN as well: who made it and
who inherited it can only be told apart in a cache that has been cleared.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, Protocol

from loralab.engines.base import Progress, Sampling
from loralab.engines.stopping import Decoder, Row

_NUMBERS = count(1)
"""Of requests, never used twice: one that an interrupt left in vLLM is nobody's."""

Groups = dict[str | None, list[Row]]
"""Rows by adapter, None the base."""


class Places(Protocol):
    """Where members are in vLLM."""

    count: int
    """Members that can be there at once."""

    def hold(self, name: str, busy: Mapping[str, int]) -> None:
        """Have vLLM hold a member, in place of one that is not busy. Raises ValueError as vLLM."""
        ...

    def lora(self, name: str) -> Any:
        """What vLLM calls a member that it holds."""
        ...


class Flight:
    """One call of `generate`. Takes vLLM's LLMEngine; `finish` gives every row its completion."""

    def __init__(
        self,
        core: Any,
        places: Places,
        decoder: Decoder,
        rows: Sequence[Row],
        adapters: Sequence[str | None],
        progress: Progress | None,
    ) -> None:
        self._core, self._places, self._decoder = core, places, decoder
        self._groups: Groups = {}
        for row, adapter in zip(rows, adapters, strict=True):
            if row.completion is None:
                self._groups.setdefault(adapter, []).append(row)
        self._flying: dict[str, tuple[Row, str | None]] = {}
        self._busy: Counter[str] = Counter()
        self._suspects: Groups = {}
        self._total = len(rows)
        self._finished = sum(row.completion is not None for row in rows)
        self._progress = progress

    def finish(self) -> None:
        """Step vLLM until every row has its completion."""
        try:
            if self._finished:
                self._report()
            self._fly(self._groups)
            suspects, self._suspects = self._suspects, {}
            for adapter, rows in suspects.items():
                clear_cache(self._core)
                self._fly({adapter: rows})
                for row in self._suspects.pop(adapter, []):
                    self._end(row, "logits are NaN")
            if suspects:
                clear_cache(self._core)
                self._report()
        finally:
            self._core.abort_request(list(self._flying))

    def _fly(self, groups: Groups) -> None:
        # The base needs no place: it need not wait for one.
        waiting = deque(sorted(groups.items(), key=lambda group: group[0] is not None))
        while waiting or self._flying:
            before = self._finished
            while waiting and self._admit(*waiting[0]):
                waiting.popleft()
            for output in self._core.step():
                self._take(output)
            if self._finished > before:
                self._report()

    def _admit(self, adapter: str | None, rows: Sequence[Row]) -> bool:
        """Let a member's rows in; False if there is no place for it yet."""
        if adapter is not None:
            if len(+self._busy) >= self._places.count:
                return False
            try:
                self._places.hold(adapter, self._busy)
            except ValueError as error:
                for row in rows:
                    self._end(row, f"vLLM does not load it: {first_line(error)}")
                return True
        for row in rows:
            self._let_in(row, adapter)
        return True

    def _let_in(self, row: Row, adapter: str | None) -> None:
        from vllm.inputs import tokens_input

        number = str(next(_NUMBERS))
        self._flying[number] = row, adapter
        try:
            self._core.add_request(
                number,
                tokens_input(row.prompt),
                parameters(row, self._decoder),
                lora_request=None if adapter is None else self._places.lora(adapter),
            )
        except ValueError as error:
            del self._flying[number]
            self._end(row, f"vLLM refuses it: {first_line(error)}")
            return
        if adapter is not None:
            self._busy[adapter] += 1

    def _take(self, output: Any) -> None:
        """Tokens of one request, all of them or since the last step."""
        if output.request_id not in self._flying:
            return
        row, adapter = self._flying[output.request_id]
        made = output.outputs[0]
        sick = output.metrics is not None and output.metrics.is_corrupted
        if sick:
            # Which of its tokens came before the NaN is not told.
            row.tokens.clear()
            self._suspects.setdefault(adapter, []).append(row)
        else:
            for token in made.token_ids:
                if row.completion is None:
                    row.accept(token)
            if row.completion is None and output.finished:
                row.fail(f"vLLM ended it after {len(row.tokens)} tokens: {made.finish_reason}")
            if row.completion is None:
                return
            self._finished += 1
        if not output.finished:
            self._core.abort_request([output.request_id])
        del self._flying[output.request_id]
        if adapter is not None:
            self._busy[adapter] -= 1

    def _end(self, row: Row, why: str) -> None:
        row.fail(why)
        self._finished += 1

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._finished, self._total)


def parameters(row: Row, decoder: Decoder) -> Any:
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


def clear_cache(core: Any) -> None:
    """Forget every prompt, and fill the key-value cache with zeros. No request may be in flight."""
    core.reset_prefix_cache()
    core.collective_rpc(_fill_with_zeros)


def _fill_with_zeros(worker: Any) -> None:
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def first_line(error: Exception) -> str:
    """Of what an error says, or its type's name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
