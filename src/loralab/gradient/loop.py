"""What every training loop here shares: Transformers' Trainer, watched, its checkpoints whole.

The loop, the optimiser, the schedule and many machines are the Trainer's (on Accelerate). Ours are
the eyes on it: each number is looked at as it comes, each step says what it did and how long it
took.

A checkpoint holds the adapter in safetensors, and the state of optimiser, schedule and random
numbers as the Trainer writes them with torch.save; they are read back with weights_only=True,
which makes tensors and plain containers and runs no code. The Trainer's pickled arguments are
not kept.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil, isfinite
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from loralab import durable, ranks
from loralab.adapters.inits.progressive import callback_for
from loralab.config import TrainingConfig
from loralab.errors import UserError
from loralab.gradient.collate import token_count
from loralab.gradient.shares import BLANK, shared_loader
from loralab.health.guard import GuardCallback


class NonFiniteError(UserError):
    """A loss or gradient norm that is no number. The weights are those of the step before.

    step: counts from 1, the step that was not made.
    """

    def __init__(self, step: int, what: str, value: float) -> None:
        self.step = step
        super().__init__(
            f"step {step}: {what} is {value}; stopped before it reached the weights. Lower "
            "training.lr, lengthen training.warmup, or set training.max_grad_norm=1"
        )


@dataclass(frozen=True)
class History:
    """How training went, one entry a step since its beginning.

    losses: mean negative log-likelihood per learned token, in nats. grad_norms: before clipping.
    tokens: through the model in this session, padding left out, in `seconds` of making steps.
    complete: False if a callback stopped it. notes: what was not done the fast way, and why.
    """

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    learning_rates: tuple[float, ...]
    tokens: int
    seconds: float
    complete: bool
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @staticmethod
    def of(trainer: Watched, notes: tuple[str, ...]) -> History:
        """What a trainer that has run its steps did."""
        steps = [row for row in trainer.state.log_history if "loss" in row]
        return History(
            losses=tuple(float(row["loss"]) for row in steps),
            grad_norms=tuple(float(row["grad_norm"]) for row in steps),
            learning_rates=tuple(float(row["learning_rate"]) for row in steps),
            tokens=trainer.tokens_here,
            seconds=trainer.seconds_here,
            complete=trainer.state.global_step >= trainer.state.max_steps,
            notes=notes,
        )


def arguments(
    kind: type[TrainingArguments],
    model: Any,
    settings: TrainingConfig,
    seed: int,
    folder: Path,
    autocast: bool,
    keep: bool,
    **more: Any,
) -> Any:
    """The Trainer's arguments of this kind, from a config's `training` section.

    keep: whether checkpoints are written. more: arguments of that kind alone.

    Raises:
        UserError: an optimizer or tracker that is not there.
    """
    length: dict[str, Any] = (
        {"max_steps": settings.steps}
        if settings.steps is not None
        else {"num_train_epochs": settings.epochs}
    )
    for tracker in settings.report_to:
        if find_spec(tracker) is None:
            raise UserError(
                f"training.report_to: {tracker} is not installed; pip install {tracker}, or leave "
                "it out"
            )
    schedule = settings.schedule
    if schedule == "constant" and settings.warmup:
        schedule = "constant_with_warmup"  # type: ignore[assignment]
    try:
        made = kind(
            output_dir=str(folder),
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.grad_accumulation,
            learning_rate=settings.lr,
            lr_scheduler_type=schedule,
            warmup_steps=settings.warmup,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            optim=settings.optimizer,
            gradient_checkpointing=settings.gradient_checkpointing,
            seed=seed % 2**32,
            bf16=autocast,
            use_cpu=next(model.parameters()).device.type == "cpu",
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps" if keep else "no",
            save_steps=settings.save_every,
            save_total_limit=2,
            report_to=list(settings.report_to) or "none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            ddp_broadcast_buffers=False,
            **length,
            **more,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    if made.n_gpu > 1:
        # Or the Trainer copies the model onto every GPU in sight (DataParallel) and multiplies the
        # batch by their number; a launcher's processes have one each.
        made._n_gpu = 1
    return made


class Watched(Trainer):  # type: ignore[misc]
    """A Trainer that stops at a number that is not finite and logs each step in full.

    An adapter whose scaling is to rise from 0 (`progressive`) has it rise here.

    Of several processes each takes its share of every batch (`shares`), and what is logged is of
    all. mean_over_rows: the loss is a mean over a batch's rows, not over its labels; then
    `compute_loss` multiplies its own by `weight`. blank: this process has none of the batch's rows.
    """

    mean_over_rows = False
    blank = False
    tokens_here = 0
    seconds_here = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_began = perf_counter()
        self._noted: dict[str, list[float]] = {}
        self._rise = callback_for(self.model)
        if self._rise is not None:
            self.add_callback(self._rise)
        self._guards = [
            callback
            for callback in self.callback_handler.callbacks
            if isinstance(callback, GuardCallback)
        ]
        for guard in self._guards:
            guard.on_cost = self._not_of_the_step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            for guard in self._guards:
                guard.close()
            if self._rise is not None:
                # Also where it broke off: what is saved then has the strength it was trained with.
                self._rise.schedule.finish(self.model)

    def _not_of_the_step(self, seconds: float) -> None:
        """A step's time is that of training alone."""
        self._step_began += seconds

    def get_train_dataloader(self) -> Any:
        rank, world = ranks.rank(), ranks.world()
        if world == 1:
            return super().get_train_dataloader()
        loader = shared_loader(
            self.train_dataset,
            self._get_train_sampler(),
            self.args.per_device_train_batch_size,
            self.data_collator,
            self.accelerator.device,
            rank,
            world,
            mask=not self.mean_over_rows,
        )
        if rank:
            # After the order of rows is fixed, which is the same for all: dropout is not.
            torch.manual_seed(self.args.seed + rank)
        return loader

    def weight(self, rows: int) -> float:
        """What a mean over this process's rows counts in the update; 1 alone."""
        return ranks.share(0 if self.blank else rows)

    def note(self, **values: float) -> None:
        """Numbers for the step's line of the log; the mean over the calls in one step, and over
        the processes."""
        for name, value in values.items():
            self._noted.setdefault(name, []).append(value)

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        self.blank = bool(inputs.pop(BLANK, False))
        value: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._check("the loss", ranks.worst(float(value)))
        return value

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check("the gradient's norm", float(norm))
        return norm

    def _check(self, what: str, value: float) -> None:
        if not isfinite(value):
            raise NonFiniteError(self.state.global_step + 1, what, value)

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        [total] = ranks.summed([0 if self.blank else token_count(inputs)])
        count = int(total)
        self.tokens_here += count
        self.state.num_input_tokens_seen += count

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        now = perf_counter()
        logs["tokens"] = self.state.num_input_tokens_seen
        if "loss" in logs:
            logs["seconds"] = now - self._step_began
            self.seconds_here += logs["seconds"]
            means = ranks.summed([fmean(values) for values in self._noted.values()])
            logs |= {n: m / ranks.world() for n, m in zip(self._noted, means, strict=True)}
            self._noted.clear()
        super().log(logs, start_time)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._step_began = perf_counter()
        return super().get_batch_samples(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The model alone: no pickled arguments, and no question to the hub about embeddings."""
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        peft = {"save_embedding_layers": False} if hasattr(self.model, "peft_config") else {}
        self.model.save_pretrained(folder, state_dict=state_dict, **peft)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint appears whole: written under another name, then renamed."""
        place = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        draft = place / f"{durable.TEMPORARY_PREFIX}checkpoint"
        leads = self.args.should_save
        with durable.explain_os_errors(place):
            if leads:
                shutil.rmtree(draft, ignore_errors=True)
            ranks.wait()
            self.args.output_dir = str(draft)
            try:
                # Each process adds the state of its random numbers.
                Trainer._save_checkpoint(self, model, trial)
            finally:
                self.args.output_dir = str(place)
            ranks.wait()
            if not leads:
                return
            for file in (draft / name).rglob("*"):
                if file.is_file():
                    durable.sync_file(file)
            durable.seal(draft / name)
            shutil.rmtree(place / name, ignore_errors=True)
            os.replace(draft / name, place / name)
            draft.rmdir()
            durable.sync_folder(place)
        for old in checkpoints(place)[: -self.args.save_total_limit]:
            shutil.rmtree(old, ignore_errors=True)


def total_steps(rows: int, settings: TrainingConfig) -> int:
    """How many updates the settings ask for, of this many rows (before packing)."""
    if settings.steps is not None:
        return settings.steps
    batches = ceil(rows / settings.batch_size)
    return ceil(ceil(batches / settings.grad_accumulation) * (settings.epochs or 0))


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit() and (path / "trainer_state.json").is_file()
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of steps that were made when a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def precision_kept(model: Any) -> Iterator[None]:
    """Keep trainable weights as they are while TRL makes a trainer.

    It rounds the adapter of a quantised base to bf16, where most updates are smaller than a
    weight's last bit; after a resume, PEFT has it back in float32, and the run is another one.
    """
    before = [(p, p.data) for p in model.parameters() if p.requires_grad]
    yield
    for parameter, data in before:
        parameter.data = data


@contextmanager
def fast_step(model: Any) -> Iterator[tuple[str, ...]]:
    """Fused LoRA products and native layers while it trains, and what to say of those left out.

    A model that was patched before stays so.
    """
    from loralab.gradient import fast
    from loralab.gradient.layers import fused_layers

    before = fast.report(model).taken
    fast.patch(model)
    now = fast.report(model)
    try:
        with fused_layers(model) as layers:
            yield ((str(now),) if now.left else ()) + layers.notes
    finally:
        if not before:
            fast.unpatch(model)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' advice, which would write over a live display; failures raise."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # TRL itself uses names that Transformers has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message=".*is deprecated and will be removed")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
