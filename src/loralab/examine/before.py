"""A run before it starts: its rows or its reward, its model before the first step, its memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loralab import tasks
from loralab.config import (
    AdapterConfig,
    AnyConfig,
    DpoConfig,
    EvolveConfig,
    GrpoConfig,
    SftConfig,
    TrainingConfig,
)
from loralab.engines.prompts import PromptEncoder
from loralab.errors import UserError
from loralab.examine.rewards import reward_findings
from loralab.examine.rows import MOST_ROWS, cut, rows_of
from loralab.examine.search import first_generation
from loralab.gradient.fine_tune import trainable
from loralab.gradient.loop import total_steps
from loralab.gradient.preferences import Preferences
from loralab.gradient.rows import IGNORED, Row
from loralab.health.data import DataProbe
from loralab.health.doctor import Report, diagnose
from loralab.health.preflight import Memory, dose, memory
from loralab.health.setup import setup_values
from loralab.models.load import load
from loralab.tasks.base import Task
from loralab.tasks.documents import documents
from loralab.tasks.supervised import task_of

_TEXTS = 64
"""Prompts that an initialisation which looks at text is given where no rows are learned."""


def examine_config(config: AnyConfig, task: Task | None = None, **options: Any) -> Report:
    """A run before it starts. Nothing is trained or kept.

    Rows are looked at up to the first 2,000. Of a run that learns from a reward, whether that
    tells answers from texts without merit; of a search also a few members of its first generation.
    task: examined beside a run's rows.

    Raises:
        UserError: a kind that trains no adapter of a language model, or what the run itself would
            refuse.
    """
    began = time.perf_counter()
    if not isinstance(config, SftConfig | DpoConfig | GrpoConfig | EvolveConfig):
        raise UserError(
            f"config {config.name!r}: kind {config.kind} cannot be examined before it starts; "
            "known: sft, dpo, grpo, evolve"
        )
    if isinstance(config, SftConfig | DpoConfig):
        report = _of_rows(config, task, options)
    elif task is None:
        report = _of_reward(config, options)
    else:
        raise UserError(f"config {config.name!r} names its own task: task.name=NAME, not --task")
    return replace(report, kind=f"config {config.kind}", seconds=time.perf_counter() - began)


def _of_rows(config: SftConfig | DpoConfig, task: Task | None, options: Any) -> Report:
    own = (
        task_of(config) if isinstance(config, SftConfig) else Preferences(config.data, config.seed)
    )
    settings = config.training
    quantization = getattr(config, "quantization", None)
    model, tokenizer = load(config.model, config.dtype, config.device, quantization)
    rows = rows_of(own, "train", tokenizer)
    trained = _trainable(config, model, tokenizer, [row for row in rows if row.input_ids])
    need = _memory(trained, settings, rows)
    steps = total_steps(max(1, len(own.examples("train"))), settings)
    probe = _training_rows(settings, own, rows, tokenizer)
    values = dose(settings.optimizer, settings.lr, steps, settings.schedule) | need.values()
    notes = [str(need)]
    if len(rows) >= MOST_ROWS:
        notes.append(f"data: the first {len(rows)} rows were looked at")
    return _diagnosed(config, trained, tokenizer, values, notes, task, options, probe)


def _of_reward(config: GrpoConfig | EvolveConfig, options: Any) -> Report:
    own = tasks.get(config.task.name, **config.task.options)
    found, notes = reward_findings(own)
    quantization = getattr(config, "quantization", None)
    model, tokenizer = load(config.model, config.dtype, config.device, quantization)
    values: dict[str, float] = {}
    if isinstance(config, EvolveConfig):
        first = first_generation(config, own, model, tokenizer)
        values |= first.values
        notes += first.notes
    trained = _started(config, own, model, tokenizer)
    if isinstance(config, GrpoConfig):
        need = _memory(trained, config.training, [])
        values |= need.values()
        notes.append(str(need))
    report = _diagnosed(config, trained, tokenizer, values, notes, own, options)
    both = sorted((*found, *report.findings), key=lambda one: one.severity != "fail")
    return replace(report, findings=tuple(both))


def _started(config: GrpoConfig | EvolveConfig, task: Task, model: Any, tokenizer: Any) -> Any:
    """The model as its training would begin."""
    if isinstance(config, EvolveConfig) and config.evolution.noise_on == "weights":
        # Nothing is attached; an adapter that does nothing gives the canaries a base to ask.
        config = config.model_copy(update={"adapter": AdapterConfig(rank=1)})
    encoder = PromptEncoder(tokenizer)
    encoded = [encoder.encode(task.prompt(one)) for one in task.examples("train")[:_TEXTS]]
    rows = [Row(tuple(ids), (IGNORED,) * len(ids)) for ids in encoded]
    return _trainable(config, model, tokenizer, rows)


def _trainable(config: Any, model: Any, tokenizer: Any, rows: Sequence[Row]) -> Any:
    return trainable(model, tokenizer, config, rows, _Notes())  # type: ignore[arg-type]


def _diagnosed(
    config: SftConfig | DpoConfig | GrpoConfig | EvolveConfig,
    trained: Any,
    tokenizer: Any,
    values: dict[str, float],
    notes: Sequence[str],
    task: Task | None,
    options: Any,
    probe: DataProbe | None = None,
) -> Report:
    report = diagnose(
        trained,
        tokenizer,
        base=None if hasattr(trained, "peft_config") else "now",
        subject=config.name,
        base_name=config.model,
        data=None if probe is None else lambda _: probe,
        task=task,
        values={"train.step": 0.0, **values, **setup_values(trained)},
        **options,
    )
    return replace(report, notes=(*report.notes, *notes))


def _training_rows(
    settings: TrainingConfig, task: Task, rows: Sequence[Row], tokenizer: Any
) -> DataProbe:
    count = len(task.examples("train"))
    seen = total_steps(count, settings) * settings.batch_size * settings.grad_accumulation
    return DataProbe(
        [cut(row, settings.max_length) for row in rows],
        tokenizer,
        max_length=settings.max_length,
        passes=seen / max(1, count),
        documents=documents(task, "train"),
        evaluated={task.name: documents(task, "test")},
    )


def _memory(model: Any, settings: TrainingConfig, rows: Sequence[Row]) -> Memory:
    """rows: what is learned; [] of a run that writes its own."""
    longest = max((len(row.input_ids) for row in rows), default=settings.max_length)
    tokens = sum(len(row.input_ids) for row in rows)
    return memory(
        model,
        settings.batch_size,
        min(settings.max_length, longest),
        learned_share=sum(row.learned for row in rows) / tokens if tokens else 1.0,
        optimizer=settings.optimizer,
        checkpointing=settings.gradient_checkpointing,
        fast=settings.fast,
    )


class _Notes:
    """Takes what a run would note down."""

    def note(self, **facts: Any) -> None:
        pass
