"""The rows of the population benchmark: which ways compete, and how each is set up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from loralab.bench.ours import Ours, make_engine
from loralab.bench.peers import Peer, Peft, PeftMixed, PeftSwitch, PerturbAndRestore
from loralab.bench.vllm_peer import Vllm
from loralab.bench.workloads import Members, Workload, random_members

if TYPE_CHECKING:
    from loralab.engines.batched import BatchedEngine

OURS = "ours"


@dataclass(frozen=True)
class Options:
    """What to measure. `None` for `core` is the last one available; for `budget`, no limit.

    members, rank, alpha, fraction: the population (see `random_members`).
    short_prompts, long_prompts, tokens: sizes of the workloads.
    repeats: laps of each row; budget: seconds of laps after which a row sits out further rounds.
    peaks: rows whose peak memory is measured, each in a process of its own.
    """

    model: str = "smollm2"
    dtype: str = "bfloat16"
    members: int = 30
    short_prompts: int = 2
    long_prompts: int = 16
    tokens: int = 64
    repeats: int = 5
    budget: float | None = None
    workloads: tuple[str, ...] = ("short", "long", "unshared")
    rows: tuple[str, ...] = ()
    peaks: tuple[str, ...] = (OURS,)
    rank: int = 8
    alpha: float = 8.0
    fraction: float = 0.1
    seed: int = 0
    core: int | None = None
    vllm_python: Path = Path(".venv-vllm/bin/python")


class Garage:
    """Makes competitors; those that can share a model or an engine do, the others get their own.

    copies: give each its own copy of the model (PEFT rewrites it, the reference changes it).
        Without it there is one model, for a process that runs one row.
    """

    def __init__(
        self,
        options: Options,
        model: Any,
        tokenizer: Any,
        workloads: Sequence[Workload],
        copies: bool,
    ) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.workloads = workloads
        self._model = model
        self._copies = copies
        self._engines: dict[str, BatchedEngine] = {}

    def model(self) -> Any:
        """A model that nobody else changes."""
        return copy.deepcopy(self._model) if self._copies else self._model

    @cached_property
    def peft(self) -> Peft:
        """The PEFT model of both PEFT rows."""
        return Peft(self.model(), self.tokenizer)

    def engine(self, backend: Literal["native", "torch"]) -> BatchedEngine:
        """The one engine of a backend."""
        if backend not in self._engines:
            self._engines[backend] = make_engine(self.model(), self.tokenizer, backend)
        return self._engines[backend]

    def vllm(self) -> Vllm:
        """vLLM with room for the largest workload."""
        return Vllm(
            self.options.vllm_python,
            self._model,
            self.tokenizer,
            dtype=self.options.dtype,
            members=self.options.members,
            rank=self.options.rank,
            longest=max(len(ids) + work.tokens for work in self.workloads for ids in work.ids),
            sequences=self.options.members * max(len(work.ids) for work in self.workloads),
        )

    def members(self, noise: str) -> Members:
        """The population with noise on "B" (shared A) or on "AB"."""
        return self._members_B if noise == "B" else self._members_AB

    @cached_property
    def _members_B(self) -> Members:
        return self._random_members(share_A=True)

    @cached_property
    def _members_AB(self) -> Members:
        return self._random_members(share_A=False)

    def _random_members(self, share_A: bool) -> Members:
        options = self.options
        return random_members(
            self._model,
            options.members,
            options.rank,
            options.alpha,
            options.fraction,
            getattr(torch, options.dtype),
            options.seed,
            share_A,
        )


@dataclass(frozen=True)
class Row:
    """One competitor. `comparable`: its text is that of the reference, up to rounding."""

    label: str
    make: Callable[[Garage], Peer]
    noise: str = "B"
    comparable: bool = True


REFERENCE = "reference"

ROWS: Mapping[str, Row] = {
    REFERENCE: Row(
        "reference way: perturb, `generate`, restore, member by member",
        lambda g: PerturbAndRestore(g.model(), g.tokenizer),
    ),
    "peft-set": Row("PEFT, `set_adapter` per member", lambda g: PeftSwitch(g.peft)),
    "peft-mixed": Row("PEFT, one mixed batch", lambda g: PeftMixed(g.peft)),
    "vllm": Row("vLLM on the CPU, all adapters in one batch", lambda g: g.vllm()),
    OURS: Row("loralab, noise on B", lambda g: Ours(g.engine("native"))),
    "ours-ab": Row(
        "loralab, noise on A and B", lambda g: Ours(g.engine("native")), "AB", comparable=False
    ),
    "bare": Row(
        "the same engine, no adapters at all (the limit)",
        lambda g: Ours(g.engine("native"), empty=True),
        comparable=False,
    ),
    "torch": Row("loralab, plain PyTorch backend", lambda g: Ours(g.engine("torch"))),
}
"""In the order of the table."""
