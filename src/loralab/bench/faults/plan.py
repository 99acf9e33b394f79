"""What a run is to do, before it does it: the record that faults change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from loralab.tasks.base import Example, Prompt, Score

if TYPE_CHECKING:
    from loralab.bench.faults.world import World
    from loralab.gradient.rows import Row

Harm = Literal["score", "perplexity", "repetition"]
Pair = tuple[Prompt, str]


@dataclass
class Plan:
    """A run that a fault may change in place; the defaults are healthy.

    How it trains: steps, lr, batch_size, warmup, schedule; of the adapter rank, alpha, targets,
    type and its options; init: a name of `loralab inits`; peft_init: what PEFT's config is given
    instead; quantization: of the base.
    pairs, rows: change (prompt, answer) pairs, or the tokens made of them. on_model: with the
    adapter in place, before training. on_trainer: before the first step. around: holds during the
    whole run. on_saved: changes the files of the adapter.
    token_weight, poisoned: a factor of one token in the loss; the step whose loss is no number.
    merged: what is used in the end is the merged model. search: evolution instead of gradients,
    with these settings. task, sign: a kind of task in place of the one asked for, and what stands
    behind its questions. score, prompt: of an evaluation that is examined too; baseline_off: what
    it reports of the base beside what it measured.
    """

    steps: int = 60
    lr: float = 2e-3
    batch_size: int = 8
    warmup: float = 0.1
    schedule: str = "linear"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    type: str = "lora"
    type_options: dict[str, Any] = field(default_factory=dict)
    init: str = "zero_b"
    init_options: dict[str, Any] = field(default_factory=dict)
    peft_init: Any = None
    quantization: str | None = None
    dtype: str | None = None
    template: str | None = None
    pairs: list[Callable[[list[Pair], Random], list[Pair]]] = field(default_factory=list)
    rows: list[Callable[[list[Row], World], list[Row]]] = field(default_factory=list)
    on_base: list[Callable[[Any], None]] = field(default_factory=list)
    on_model: list[Callable[[Any], None]] = field(default_factory=list)
    on_trainer: list[Callable[[Any], None]] = field(default_factory=list)
    on_saved: list[Callable[[Path], None]] = field(default_factory=list)
    around: list[Callable[[], AbstractContextManager[Any]]] = field(default_factory=list)
    token_weight: float | None = None
    poisoned: int | None = None
    merged: bool = False
    search: dict[str, Any] | None = None
    task: str | None = None
    sign: str = ""
    evaluated: bool = False
    score: Callable[[Any, Example, str], Score] | None = None
    prompt: Callable[[Any, Example], Prompt] | None = None
    baseline_off: float = 0.0


Change = Callable[[Plan], None]


@dataclass(frozen=True)
class Fault:
    """setup: the name of what the healthy run with the same seed does, too. causes: ids of
    `health.causes.CAUSES` of which one has to be named. harm: what should worsen, said before."""

    name: str
    family: str
    causes: tuple[str, ...]
    harm: Harm
    what: str
    change: Change
    setup: str = "lora"


@dataclass(frozen=True)
class Control:
    """A healthy run that a hasty rule might take for a broken one."""

    name: str
    what: str
    change: Change
