"""A training loop that takes steps only when it is told to, and says what they took.

Ways to train are compared in turns, each in a process of its own (`workers`). A `Gate` stands at
the end of a step of whatever loop runs there: Transformers' Trainer through `GateCallback`, a loop
of our own by calling `watch` and `step`. Between two laps the loop stands still inside it.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralab.bench.timing import peak_rss_gb
from loralab.gradient.collate import LENGTHS
from loralab.gradient.rows import IGNORED

Order = Mapping[str, int]
"""`warm` steps that nobody measures, then `steps` that make the lap."""


class NoMoreLaps(Exception):
    """Raised inside the training loop when the last lap is done."""


@dataclass(frozen=True)
class Seen:
    """What one batch holds: tokens without padding, those learned, and a sum over the tokens that
    tells one set of rows from another however a batch is laid out."""

    tokens: int
    learned: int
    checksum: int

    @staticmethod
    def of(batch: Mapping[str, Any]) -> Seen:
        ids: Tensor = batch["input_ids"]
        mask = batch.get("attention_mask")
        real = ids if mask is None else ids[mask.bool()]
        if LENGTHS in batch and sum(batch[LENGTHS]) != real.numel():
            raise ValueError(f"{real.numel()} tokens in sequences of {batch[LENGTHS]}")
        if "labels" in batch:
            learned = batch["labels"][:, 1:] != IGNORED
        else:
            learned = batch["completion_mask"][:, 1:] != 0
        return Seen(real.numel(), int(learned.sum()), int((real * real + 7919 * real).sum()))


class Gate:
    """Lets a training loop through lap by lap.

    orders: one for each lap, in turn. answer: gets a line once the loop is ready and one a lap.
    """

    def __init__(self, orders: Iterator[Order], answer: Callable[[dict[str, Any]], None]) -> None:
        self._orders = orders
        self._answer = answer
        self._batches: deque[Seen] = deque()
        self._lap: list[Seen] = []
        self._losses: list[float] = []
        self._warm = self._left = 0
        self._clock = self._cpu = 0.0

    def open(self) -> None:
        """The loop is about to take its first step: wait for a lap.

        Raises:
            NoMoreLaps: there is none.
        """
        self._answer({"ready": True, "peak_gb": peak_rss_gb()})
        self._wait()

    def watch(self, batch: Any) -> Any:
        """A batch was made; loops may make it a step ahead. Returns it."""
        self._batches.append(Seen.of(batch))
        return batch

    def step(self, loss: float) -> None:
        """A step has ended, with this loss.

        Raises:
            NoMoreLaps: it was the last of the last lap.
        """
        seen = self._batches.popleft()
        if self._warm:
            self._warm -= 1
            if not self._warm:
                self._begin()
            return
        self._lap.append(seen)
        self._losses.append(loss)
        self._left -= 1
        if not self._left:
            self._report()
            self._wait()

    def _begin(self) -> None:
        self._clock, self._cpu = time.perf_counter(), time.process_time()

    def _report(self) -> None:
        run, cpu = time.perf_counter() - self._clock, time.process_time() - self._cpu
        self._answer(
            {
                "run": run,
                "cpu": cpu,
                "tokens": sum(seen.tokens for seen in self._lap),
                "learned": sum(seen.learned for seen in self._lap),
                "checksum": sum(seen.checksum for seen in self._lap),
                "losses": self._losses,
                "peak_gb": peak_rss_gb(),
            }
        )
        self._lap, self._losses = [], []

    def _wait(self) -> None:
        _give_memory_back()
        order = next(self._orders, None)
        if order is None:
            raise NoMoreLaps
        self._warm, self._left = order["warm"], order["steps"]
        if not self._warm:
            self._begin()


class GateCallback(TrainerCallback):  # type: ignore[misc]
    """A gate in Transformers' Trainer; wants `logging_steps=1`."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **more: Any,
    ) -> None:
        # Accelerate's loader only wraps the one that collates.
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        collate: Callable[[Sequence[Any]], Any] = loader.collate_fn
        loader.collate_fn = lambda records: self.gate.watch(collate(records))
        self.gate.open()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            self.gate.step(float(logs["loss"]))


def _give_memory_back() -> None:
    """Return freed memory to the system, so that the ways that wait do not fill the machine."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
