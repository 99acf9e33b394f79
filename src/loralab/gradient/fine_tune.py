"""A supervised fine-tuning run: from a config to a run directory, resumable at every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loralab.config import InitConfig, SftConfig
from loralab.config.training import GradientConfig
from loralab.errors import UserError
from loralab.gradient.answers import Answers
from loralab.gradient.contamination import contaminated_examples
from loralab.gradient.diary import Diary
from loralab.gradient.events import (
    OnTrainingEvent,
    Remark,
    TrainingEnded,
    TrainingStarted,
    ignore,
)
from loralab.gradient.guarded import guards
from loralab.gradient.judge import Judge
from loralab.gradient.loop import quiet, total_steps
from loralab.gradient.outputs import kept_when_not_finite, pass_on, resumed, save_trained
from loralab.gradient.rows import Prepared, Row, rows_of_task
from loralab.gradient.sft import train
from loralab.run import Run
from loralab.tasks.supervised import task_of
from loralab.timings import Timings

_TEXTS = 64
"""Training rows that an initialisation which looks at text is given."""


@dataclass(frozen=True)
class FineTuned:
    """How a run went. complete: False if it stopped at a signal. steps: done in all."""

    complete: bool
    steps: int
    losses: tuple[float, ...]


def fine_tune(
    config: SftConfig,
    run: Run,
    on_event: OnTrainingEvent = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> FineTuned:
    """Train as the config says in a run directory, or go on with what is there.

    stopping: asked after every step; True saves a checkpoint and ends the run early.

    Raises:
        NonFiniteError: a loss or gradient is not finite; `adapter/` holds the weights before it.
        UserError: something the user can mend; the run can be resumed afterwards.
    """
    with Timings.of_run(run.timings_path) as timings:
        return _fine_tune(config, run, on_event, stopping, timings)


def _fine_tune(
    config: SftConfig,
    run: Run,
    on_event: OnTrainingEvent,
    stopping: Callable[[], bool],
    timings: Timings,
) -> FineTuned:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    settings = config.training
    task = task_of(config)
    with timings.phase("data"):
        leaked = contaminated_examples(task, config.contamination, on_event)
    with timings.phase("server_launch"):
        from loralab.models.load import load

        model, tokenizer = load(config.model, config.dtype, config.device, config.quantization)
        prepared = rows_of_task(task, "train", tokenizer, settings.max_length, leaked)
        judge = Judge(model, tokenizer, task, config, limit=None if run.leads else 0)
    run.note(
        kernel=judge.kernel,
        rows=len(prepared.rows),
        rows_cut=prepared.cut,
        rows_contaminated=len(leaked),
    )
    if prepared.cut:
        on_event(Remark(_cut_remark(prepared, settings.max_length)))

    resume_from, done = resumed(run)
    answers = Answers(run, judge, timings, on_event)
    answers.before()

    with timings.phase("init_population"), quiet():
        trained = trainable(model, tokenizer, config, prepared.rows, run)
    steps = total_steps(len(prepared.rows), settings)
    on_event(
        TrainingStarted(
            model=config.model,
            task=task.name,
            rows=len(prepared.rows),
            tokens=prepared.tokens,
            learned=prepared.learned,
            parameters=sum(p.numel() for p in trained.parameters() if p.requires_grad),
            steps=steps,
            resumed_at=done or None,
        )
    )
    diary = Diary(
        config,
        run,
        timings,
        on_event,
        stopping,
        evaluate=lambda step: answers.of(trained, step, "during"),
    )
    with timings.phase("training"), kept_when_not_finite(trained, tokenizer, config.model, run):
        history = train(
            trained,
            tokenizer,
            prepared.rows,
            settings,
            config.seed,
            callbacks=[diary, *guards(config, run.path, tokenizer, on_event)],
            output_dir=run.checkpoints,
            resume_from=resume_from,
            autocast=config.full and config.dtype == "bfloat16",
        )
    pass_on(history.notes, run, on_event)
    with timings.phase("saving"):
        save_trained(trained, tokenizer, config.model, run)
    if history.complete:
        answers.of(trained, history.steps, "after")
    on_event(TrainingEnded(history.complete, history.steps))
    return FineTuned(history.complete, history.steps, history.losses)


def trainable(
    model: Any, tokenizer: Any, config: GradientConfig, rows: Sequence[Row], run: Run
) -> Any:
    """The model with its adapter attached and started, or itself with every weight in float32."""
    if config.adapter is None:
        # In bf16 most updates are smaller than the weight's last bit and would be lost.
        return model.float().requires_grad_(True)
    from loralab.adapters.attach import attach

    attached = attach(model, config.adapter, config.seed)
    init = config.adapter.init
    if init != InitConfig():
        from loralab.adapters.inits import initialize
        from loralab.adapters.inits.initialize import options_of
        from loralab.adapters.true_base import base_replaced

        texts = [tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in rows[:_TEXTS]]
        report = initialize(
            attached,
            init.name,
            tokenizer=tokenizer,
            seed=config.seed,
            **options_of(init, texts),
        )
        if base_replaced(attached):
            raise UserError(
                f"adapter.init {init.name} replaces the weights of a full-precision base, and no "
                "adapter alone holds the result; set quantization: nf4 and give it the unquantised "
                f"model as options.reference={config.model}"
            )
        run.note(init={"name": init.name, **report.figures})
    return attached


def _cut_remark(prepared: Prepared, max_length: int) -> str:
    return (
        f"{prepared.cut} of {len(prepared.rows)} rows are longer than training.max_length "
        f"{max_length} and lose their end, end token included"
    )
