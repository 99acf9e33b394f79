"""A run of a kind whose evaluation is not the batched engine's: answers, steps, what is kept.

What differs between such kinds is given as `Parts`: their model, rows and batches, and how they
answer. The way through a run is the same as that of `fine_tune`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, TrainingArguments

from loralab.config.training import GradientConfig
from loralab.errors import UserError
from loralab.gradient.answers import Answerer, Answers
from loralab.gradient.diary import Diary
from loralab.gradient.events import (
    OnTrainingEvent,
    Remark,
    TrainingEnded,
    TrainingStarted,
)
from loralab.gradient.fine_tune import FineTuned, trainable
from loralab.gradient.forward import causal_of, forward_kept
from loralab.gradient.guarded import guards
from loralab.gradient.loop import (
    History,
    Watched,
    arguments,
    fast_step,
    quiet,
    total_steps,
)
from loralab.gradient.outputs import kept_when_not_finite, pass_on, resumed, save_trained
from loralab.gradient.rows import IGNORED
from loralab.run import Run
from loralab.timings import Timings

Record = Mapping[str, Any]

STARTS = (
    "zero_b",
    "tiny",
    "random",
    "orthogonal",
    "orthogonal_negative",
    "gaussian",
    "mica",
    "progressive",
)
"""Initialisations that look at no text and leave the base, and so the rest of what is saved, as it
is."""


class Summed(Watched):
    """The loss of an update is the mean over its labels, however they fall into batches.

    It is made here, of the model's logits: many models, encoders among them, take the mean of each
    batch alone whatever they are told of the others.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # or the labels of an update are not counted

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """logits (..., classes), labels (...), -100 where nothing is learned."""
        outputs = model(**inputs)
        logits = outputs.logits.flatten(0, -2).float()
        labels = inputs["labels"].flatten().to(logits.device)
        total = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        value = total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            value = value * self.accelerator.num_processes
        return (value, outputs) if return_outputs else value


@dataclass(frozen=True)
class Parts:
    """What a kind brings to a run.

    records: training rows for `collate`. tokens, learned: in all of them, and those with a label.
    cut: rows that lost their end to a length. trainer: its class; arguments: the class of its
    arguments. wrapped: entered around training, around the model without PEFT's wrapper.
    """

    model: Any
    tokenizer: Any
    records: Sequence[Record]
    tokens: int
    learned: int
    cut: int
    collate: Callable[[Sequence[Record]], dict[str, Any]]
    judge: Answerer
    trainer: type[Summed]
    arguments: type[TrainingArguments]
    wrapped: Callable[[Any], AbstractContextManager[None]] = nullcontext


def run_session(
    config: GradientConfig,
    run: Run,
    on_event: OnTrainingEvent,
    stopping: Callable[[], bool],
    parts: Callable[[], Parts],
) -> FineTuned:
    """Train as the config says in a run directory, or go on with what is there.

    parts: made when the run's timings run. stopping: asked after every step; True saves a
    checkpoint and ends the run early.

    Raises:
        NonFiniteError: a loss or gradient is not finite; what is saved are the weights before it.
        UserError: something the user can mend; the run can be resumed afterwards.
    """
    with Timings.of_run(run.timings_path) as timings:
        return _run(config, run, on_event, stopping, timings, parts)


def _run(
    config: GradientConfig,
    run: Run,
    on_event: OnTrainingEvent,
    stopping: Callable[[], bool],
    timings: Timings,
    make: Callable[[], Parts],
) -> FineTuned:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.adapter is not None and config.adapter.init.name not in STARTS:
        raise UserError(
            f"adapter.init: {config.adapter.init.name} is for causal language models; expected "
            f"{', '.join(STARTS)}"
        )
    settings = config.training
    with timings.phase("server_launch"):
        parts = make()
    rows = len(parts.records)
    if not rows:
        raise UserError("there are no rows to train on")
    run.note(kernel="transformers", rows=rows, rows_cut=parts.cut)
    if parts.cut:
        on_event(Remark(f"{parts.cut} of {rows} rows are longer than allowed and lose their end"))
    resume_from, done = resumed(run)
    answers = Answers(run, parts.judge, timings, on_event)
    answers.before()
    with timings.phase("init_population"), quiet():
        trained = trainable(parts.model, parts.tokenizer, config, (), run)

    on_event(
        TrainingStarted(
            model=config.model,
            task=parts.judge.batch.task.name,
            rows=rows,
            tokens=parts.tokens,
            learned=parts.learned,
            parameters=sum(p.numel() for p in trained.parameters() if p.requires_grad),
            steps=total_steps(rows, settings),
            resumed_at=done or None,
        )
    )
    diary = Diary(
        config, run, timings, on_event, stopping, lambda step: answers.of(trained, step, "during")
    )
    saved = (trained, parts.tokenizer, config.model, run)
    with timings.phase("training"), kept_when_not_finite(*saved):
        watching = [diary, *guards(config, run.path, parts.tokenizer, on_event)]
        history = _train(trained, parts, config, watching, run, resume_from)
    pass_on(history.notes, run, on_event)
    with timings.phase("saving"):
        save_trained(*saved)
    if history.complete:
        answers.of(trained, history.steps, "after")
    on_event(TrainingEnded(history.complete, history.steps))
    return FineTuned(history.complete, history.steps, history.losses)


def _train(
    model: Any,
    parts: Parts,
    config: GradientConfig,
    callbacks: Sequence[Any],
    run: Run,
    resume_from: Any,
) -> History:
    inner = causal_of(model)
    notes: tuple[str, ...] = ()
    with ExitStack() as stack:
        stack.enter_context(forward_kept(model, inner))
        stack.enter_context(quiet())
        settings = arguments(
            parts.arguments,
            model,
            config.training,
            config.seed,
            run.checkpoints,
            config.full and config.dtype == "bfloat16",
            keep=True,
        )
        stack.enter_context(parts.wrapped(inner))
        trainer = parts.trainer(
            model=model,
            args=settings,
            data_collator=parts.collate,
            train_dataset=Dataset.from_list([dict(record) for record in parts.records]),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        if config.training.fast and config.adapter is not None:
            notes = stack.enter_context(fast_step(model))
        try:
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        finally:
            model.eval()
    return History.of(trainer, notes)
