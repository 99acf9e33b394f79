"""Members and prompts on an SGLang server: adapters by path, prompts as our own ids.

Scheduling, memory and kernels are SGLang's. What makes two engines comparable stays ours: how a
prompt becomes tokens, when a completion ends, what its text is, and which errors are whose.

The server's routes and fields are those of sglang 0.5.23 (`srt/entrypoints/http_server.py`,
`srt/managers/io_struct.py`, `api/v1/api_types.py`). Of its ways to take an adapter only that by
path is used: its tensor route unpickles what it is sent.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor

from loralab.adapters.state import AdapterState
from loralab.config import SglangConfig
from loralab.engines.base import Completion, Progress, Request
from loralab.engines.http_json import Failed, Unreachable
from loralab.engines.memory_folder import MemoryFolder
from loralab.engines.served import Finite, ServedModel, named, refuse_base_changes
from loralab.engines.sglang_link import Link, Lost
from loralab.engines.stopping import Row
from loralab.errors import UserError

_log = logging.getLogger(__name__)

STOPS = 32
"""Stop strings that SGLang takes; ours are looked for in its ids once more."""

Asked = tuple[Row, str | None]
"""A row and the server's name of its adapter."""


class SglangEngine:
    """Generates for any mix of loaded LoRA adapters over a model that an SGLang server runs.

    model: what the server runs, as the driver knows it. link: the server. Members are written as
    PEFT folders to `options.folder` or memory, under names never used before, and are gone after
    use. A server that dies under way is started anew, or waited for if it is not ours: its adapters
    are loaded again and the requests it lost are asked again, `options.retries` times a call. One
    that cannot answer in the end (busy, silent, gone) ends the call: no request fails for it.

    Errors that a user can mend are UserError; whatever concerns one request alone comes back as a
    Completion with finish_reason "error".
    """

    accepts: frozenset[str] = frozenset({"lora"})

    def __init__(self, model: ServedModel, link: Link, options: SglangConfig) -> None:
        self._link, self._options = link, options
        context = min(model.context or link.context, link.context)
        self._model = replace(model, context=context)
        self._folder = MemoryFolder(options.folder)
        self._session = secrets.token_hex(4)
        self._made = 0
        self._states: dict[str, AdapterState] = {}
        self._sick: dict[str, str] = {}
        self._held: dict[str, str] = {}

    @property
    def kernel(self) -> str:
        """Server, version, model and dtype, for the run's record."""
        return self._link.kernel

    def load(self, adapters: Mapping[str, AdapterState]) -> None:
        """Replace the loaded adapters.

        Raises UserError, before anything changes, for one that this engine cannot run, and where
        the server takes none; one that holds NaN, or that alone is refused, fails its own requests.
        """
        for name, state in adapters.items():
            if state.kind not in self.accepts:
                raise UserError(
                    f"adapter {name!r} is of kind {state.kind!r}: SGLang runs "
                    f"{', '.join(sorted(self.accepts))} only"
                )
            self._model.check(name, state)
            if state.rank > self._link.max_rank:
                raise UserError(
                    f"adapter {name!r} has rank {state.rank}: the server was started for ranks up "
                    f"to {self._link.max_rank} (--max-lora-rank)"
                )
        if self._link.max_loaded is not None and len(adapters) > self._link.max_loaded:
            raise UserError(
                f"{len(adapters)} adapters, and the server keeps {self._link.max_loaded}: start it "
                "without --max-loaded-loras"
            )
        finite = Finite(self._model.dtype)
        complaints = {name: finite.complaint(state) for name, state in adapters.items()}
        self._states = dict(adapters)
        self._sick = {name: why for name, why in complaints.items() if why is not None}
        self._persist(self._hold_anew)

    def set_base(self, changes: Mapping[str, Tensor]) -> None:
        """Nothing: the base stays as it was loaded. Raises UserError where it should move."""
        refuse_base_changes("sglang", changes)

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[Completion]:
        """Completions in the order of the requests.

        Raises:
            UserError: an adapter is not loaded; the server is gone for good, cannot answer after
                all retries, refuses the key, or would sample without the requests' seeds.

        Whatever else is raised on the way, KeyboardInterrupt and what `progress` raises with it,
        closes the connections of requests in flight, which the server then drops.
        """
        for request in requests:
            if request.adapter is not None and request.adapter not in self._states:
                known = ", ".join(list(self._states)[:8]) or "none"
                raise UserError(
                    f"adapter {request.adapter!r} is not loaded (loaded: {known}): call load first"
                )
        if not self._link.steady and any(r.sampling.temperature > 0 for r in requests):
            raise UserError(
                f"the server at {self._link.client.url} does not keep to seeds: start it with "
                "--enable-deterministic-inference, or set temperature: 0"
            )
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        report = _Report(len(rows), sum(row.completion is not None for row in rows), progress)
        self._persist(lambda: self._serve(rows, requests, report))
        return [named(row, request) for row, request in zip(rows, requests, strict=True)]

    def close(self) -> None:
        """Take the adapters off the server, or end the server if it is ours; remove every file."""
        aliases = list(self._held.values())
        self._states, self._held = {}, {}
        with ExitStack() as stack:
            stack.callback(self._folder.close)
            self._link.close(aliases)

    def _row(self, index: int, request: Request) -> Row:
        row = self._model.row(index, request)
        longest = self._link.longest_prompt
        if row.completion is None and len(row.prompt) > longest:
            row.fail(
                f"the prompt has {len(row.prompt)} tokens; the server takes {longest} at most: "
                "shorten it"
            )
        return row

    def _persist(self, act: Callable[[], None]) -> None:
        """Do it, and again with a server that came back, as often as `options.retries` says."""
        gone: Exception | None = None
        for attempt in range(self._options.retries + 1):
            try:
                if gone is not None:
                    _log.warning("the SGLang server cannot answer (%s): waiting for it", gone)
                    self._link.recover()
                    # Names are new on a server that may be the old one, which still holds these.
                    self._let_go_of_all()
                act()
                return
            except (Lost, Unreachable, Failed) as error:
                gone = error
                if attempt == self._options.retries:
                    raise UserError(
                        f"the SGLang server cannot answer: {error}; the run can be resumed with "
                        "--resume"
                    ) from error

    def _hold_anew(self) -> None:
        self._let_go_of_all()
        self._hold_all()

    def _hold_all(self) -> None:
        """Have the server hold every sound member."""
        wanted = [n for n in self._states if n not in self._held and n not in self._sick]
        refused = {name: why for name in wanted if (why := self._hold(name)) is not None}
        if refused and len(refused) == len(wanted):
            name, why = next(iter(refused.items()))
            raise UserError(f"adapter {name!r}: the server does not load it: {why}")
        self._sick |= {n: f"the server does not load it: {why}" for n, why in refused.items()}

    def _hold(self, name: str) -> str | None:
        """Load one member under a new name; why the server does not take it, None if it does."""
        self._made += 1
        alias = f"loralab-{self._session}-{self._made}"
        path = self._folder.path / alias
        try:
            self._model.uniform(self._states[name]).save(path)
        except OSError as error:
            raise UserError(
                f"cannot write a member to {path.parent}: {error.strerror or error}; free some "
                "space, or set engine.sglang.folder"
            ) from error
        why: str | None = "it was not asked"
        try:
            why = self._link.load(alias, path)
        finally:
            if why is not None:
                shutil.rmtree(path, ignore_errors=True)
        if why is None:
            self._held[name] = alias
        return why

    def _let_go_of_all(self) -> None:
        for name in list(self._held):
            self._link.unload(self._held[name])
            alias = self._held.pop(name)
            shutil.rmtree(self._folder.path / alias, ignore_errors=True)

    def _serve(self, rows: Sequence[Row], requests: Sequence[Request], report: _Report) -> None:
        self._hold_all()
        waiting: list[Asked] = []
        for row, request in zip(rows, requests, strict=True):
            if row.completion is None and request.adapter in self._sick:
                row.fail(self._sick[request.adapter])
                report.count(1)
            elif row.completion is None:
                waiting.append((row, request.adapter and self._held[request.adapter]))
        # A batch of few adapters waits for few places on the server.
        waiting.sort(key=lambda asked: (asked[1] or "", asked[0].index))
        batches = _batches(waiting, self._options.batch, self._link.max_loras)

        def done(_: int, answers: list[tuple[Row, Any]]) -> None:
            for row, answer in answers:
                if isinstance(answer, str):
                    row.fail(answer)
                else:
                    self._finish(row, answer)
            report.count(len(answers))
            report.tell()

        report.tell()
        self._link.client.ask_all(
            lambda at: self._ask(batches[at]), range(len(batches)), self._options.workers, done
        )

    def _ask(self, batch: Sequence[Asked]) -> list[tuple[Row, Any]]:
        """Each row with the server's answer, or why it has none. Raises Failed where it is the
        server that gives none."""
        try:
            answers = self._link.generate(self._body(batch), len(batch))
            return [(row, answer) for (row, _), answer in zip(batch, answers, strict=True)]
        except Failed as error:
            if error.of_server:
                raise
            # The server refuses a batch for one of its requests.
            if len(batch) > 1:
                return [found for asked in batch for found in self._ask([asked])]
            [(row, alias)] = batch
            self._link.check_held(alias)
            return [(row, str(error))]

    def _body(self, batch: Sequence[Asked]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "input_ids": [row.prompt for row, _ in batch],
            "sampling_params": [self._sampling(row) for row, _ in batch],
        }
        if any(alias is not None for _, alias in batch):
            body["lora_path"] = [alias for _, alias in batch]
        return body

    def _sampling(self, row: Row) -> dict[str, Any]:
        """Every setting that has an effect, so that none of the server's defaults has."""
        wanted = row.sampling
        stop = [text for text in wanted.stop if text][:STOPS]
        return {
            "max_new_tokens": row.limit,
            "min_new_tokens": 0,
            "temperature": wanted.temperature,
            "top_k": wanted.top_k or -1,
            "top_p": wanted.top_p,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "n": 1,
            "ignore_eos": False,
            "stop": stop or None,
            "stop_token_ids": sorted(self._model.decoder.ends_for(wanted.stop)),
            # Read under --enable-deterministic-inference alone, and then as a signed 64-bit number.
            "sampling_seed": wanted.seed % 2**63,
        }

    def _finish(self, row: Row, answer: Mapping[str, Any]) -> None:
        """End a row by our own rules over the server's ids; where they do not, by the server's
        word."""
        reason = answer["meta_info"]["finish_reason"] or {}
        status = reason.get("status_code")
        if isinstance(status, int) and status >= 500:
            raise Lost(f"the server ended a request: {reason.get('message', reason)}")
        for token in answer["output_ids"]:
            row.accept(token)
            if row.completion is not None:
                return
        match reason.get("type"):
            case "length" if len(row.tokens) < row.limit:
                raise UserError(
                    f"the server ended a completion after {len(row.tokens)} of {row.limit} tokens: "
                    "its KV cache holds no more; give it more memory (--mem-fraction-static) or "
                    "lower generation.max_new_tokens, and resume the run with --resume"
                )
            case "stop" | "length" as kind:
                text = self._model.decoder.text(row.tokens)
                row.completion = Completion(text, tuple(row.tokens), kind)
            case _:
                row.fail(f"the server ended it: {reason.get('message', reason)}")


class _Report:
    """Counts rows for `progress`."""

    def __init__(self, total: int, finished: int, progress: Progress | None) -> None:
        self._total, self._finished, self._progress = total, finished, progress

    def count(self, done: int) -> None:
        self._finished += done

    def tell(self) -> None:
        if self._progress is not None and self._finished:
            self._progress(self._finished, self._total)


def _batches(waiting: Sequence[Asked], size: int, adapters: int) -> list[list[Asked]]:
    """Cut where a batch is full, or holds as many adapters (the base counts) as the server runs."""
    batches: list[list[Asked]] = []
    held: set[str | None] = set()
    for asked in waiting:
        if (
            not batches
            or len(batches[-1]) == size
            or (asked[1] not in held and len(held) == adapters)
        ):
            batches.append([])
            held = set()
        batches[-1].append(asked)
        held.add(asked[1])
    return batches
