"""The adapter a search starts from: drawn again from its seed, or initialised once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loralab.adapters.state import AdapterState, Factors
from loralab.config import EvolveConfig
from loralab.errors import UserError
from loralab.evolution.noise import fill
from loralab.tasks.base import Task

BEFORE_ALL = -1
"""The generation whose noise is the start adapter's A, before any that perturbs it."""
START = "start"
"""Where a run directory keeps a start that cannot be drawn again."""
TEXTS = 64
"""Training examples whose prompt and gold answer an initialisation that looks at text is given."""


@dataclass(frozen=True)
class Start:
    """Where a search begins.

    adapter: fp32, what is searched.
    taken: what an initialisation such as PiSSA took out of W: the model that runs is W minus it.
    """

    adapter: AdapterState
    taken: AdapterState | None = None

    def save(self, folder: Path) -> None:
        """Write it under a run directory, where `read` finds it."""
        self.adapter.save(folder / "adapter")
        if self.taken is not None:
            self.taken.save(folder / "taken")

    @staticmethod
    def read(folder: Path) -> Start:
        """What `save` wrote.

        Raises:
            UserError: it is not there or damaged.
        """
        try:
            taken = folder / "taken"
            return Start(
                AdapterState.load(folder / "adapter"),
                AdapterState.load(taken) if taken.exists() else None,
            )
        except (OSError, UserError) as error:
            raise UserError(f"{folder}: the start of the search cannot be read: {error}") from error


def is_drawn(config: EvolveConfig) -> bool:
    """Whether the start can be drawn again from the seed alone, so that none need be kept.

    zero_b without options: evolution's own default is N(0, 1/in), drawn from the counter-based
    stream (`start_adapter`), not the kaiming of `zero_b` with options.a=kaiming.
    """
    return config.adapter.init.name == "zero_b" and not config.adapter.init.options


def start_adapter(
    shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float, seed: int, base: str | None
) -> AdapterState:
    """A (rank, in) ~ N(0, 1 / in), B (out, rank) = 0, in fp32: the base model's own behaviour.

    shapes: (out, in) of each module's weight.
    """
    factors = {}
    for name, (d_out, d_in) in shapes.items():
        a = np.empty((rank, d_in), dtype=np.float32)
        fill(a, seed, BEFORE_ALL, 0, f"{name}.A")
        a *= np.float32(1.0 / sqrt(d_in))
        factors[name] = Factors(torch.from_numpy(a), torch.zeros(d_out, rank))
    return AdapterState(factors, alpha / rank, base=base)


def initialised(config: EvolveConfig, task: Task) -> Start:
    """The start by the config's `adapter.init`, on a copy of the model that is given up again.

    Raises:
        UserError: the initialisation cannot run, or what it makes cannot be searched.
    """
    from loralab.adapters.attach import attach
    from loralab.adapters.extract import parts_of
    from loralab.adapters.inits import initialize
    from loralab.adapters.inits.initialize import options_of
    from loralab.models.load import load

    model, tokenizer = load(config.model, config.dtype, config.device)
    peft = attach(model, config.adapter, config.seed)
    init = config.adapter.init
    options = options_of(init, texts_of(task, tokenizer))
    initialize(peft, init.name, tokenizer=tokenizer, seed=config.seed, **options)
    adapter, taken = parts_of(peft)
    for name, factors in adapter.factors.items():
        if not bool(factors.A.any()):
            raise UserError(
                f"adapter.init {init.name}: A of {name} is zero, and noise on B then changes "
                "nothing; evolve another start"
            )
    named = replace(adapter, base=config.model)
    return Start(named, None if taken is None else replace(taken, base=config.model))


def texts_of(task: Task, tokenizer: Any) -> Sequence[str]:
    """Training prompts as the model is given them, each with its gold answer if it has one."""
    texts = []
    for example in task.examples("train")[:TEXTS]:
        prompt = task.prompt(example)
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True
            )
        texts.append(prompt + (task.gold(example) or ""))
    return texts


Initialise = Callable[[EvolveConfig, Task], Start]
