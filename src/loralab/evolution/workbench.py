"""The model and the engine a search works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loralab.adapters.attach import targeted_weights
from loralab.config import EvolveConfig
from loralab.engines.base import Engine
from loralab.evolution.start import Initialise, initialised


class PopulationEngine(Engine, Protocol):
    """An engine that names its kernels and can move the base weights."""

    @property
    def kernel(self) -> str:
        """Names what generates: greedy text in bf16 differs between kernels."""
        ...

    def set_base(self, changes: Mapping[str, Tensor]) -> None:
        """W := true base + change (out, in) by module name; modules not named are the true base."""
        ...


@dataclass(frozen=True)
class Workbench:
    """An engine over a model.

    weights: (out, in) of each module searched, as the engine found them.
    save_model: writes the model with the base weights as the engine holds them now.
    initialise: makes the start that `adapter.init` asks for.
    close: ends what the engine started (a server, an actor); nothing to do in this process.
    """

    engine: PopulationEngine
    weights: Mapping[str, Tensor]
    save_model: Callable[[Path], None]
    initialise: Initialise = initialised
    close: Callable[[], None] = lambda: None


Open = Callable[[EvolveConfig], Workbench]


def open_batched(config: EvolveConfig) -> Workbench:
    """Load the config's model and put the in-process population engine over it."""
    from transformers.utils import logging

    from loralab.engines.batched import BatchedEngine
    from loralab.models.load import load

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, tokenizer = load(config.model, config.dtype, config.device)
    weights = targeted_weights(model, config.adapter)
    engine = BatchedEngine(
        model,
        tokenizer,
        backend=config.engine.backend,
        memory_gb=config.engine.memory_gb,
        threads=config.threads,
    )

    def save_model(directory: Path) -> None:
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # it would write over a live display
        try:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        finally:
            if bars:
                logging.enable_progress_bar()

    return Workbench(engine, weights, save_model)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Hex digest of names, shapes and a sample of the values: tells one model from another."""
    digest = blake2b(digest_size=16)
    for name, weight in weights.items():
        digest.update(f"{name}|{tuple(weight.shape)}|{weight.dtype}".encode())
        digest.update(sample_rows(weight, 2).float().numpy().tobytes())
    return digest.hexdigest()


def sample_rows(weight: Tensor, rows: int) -> Tensor:
    """A copy of the first rows, which stays as it is when the engine moves the weights."""
    return weight[:rows].detach().cpu().clone()
