"""A supervised fine-tuning run: from a config to a run directory, resumable at every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralab.config import SftConfig
from loralab.gradient.events import (
    Answered,
    Answering,
    OnTrainingEvent,
    Remark,
    StepDone,
    TrainingEnded,
    TrainingStarted,
    ignore,
)
from loralab.gradient.judge import Judge, score_row
from loralab.gradient.loop import NonFiniteError, checkpoints, quiet, step_of, total_steps
from loralab.gradient.outputs import rewind, save_trained
from loralab.gradient.rows import Prepared, Row, rows_of_task
from loralab.gradient.sft import train
from loralab.rollouts import Rollout, completion_rows, plain
from loralab.run import Run
from loralab.tasks.supervised import task_of
from loralab.timings import Timings

SHOWN_DURING = 8
"""Held-out answers written down at each evaluation in between; before and after, all are."""
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
    timings = Timings.load(run.timings_path)
    try:
        with timings.phase("total_experiment"):
            return _fine_tune(config, run, on_event, stopping, timings)
    finally:
        timings.save(run.timings_path)


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
    with timings.phase("server_launch"):
        from loralab.models.load import load

        model, tokenizer = load(config.model, config.dtype, config.device)
        prepared = rows_of_task(task, "train", tokenizer, settings.max_length)
        judge = Judge(model, tokenizer, task, config)
    run.note(kernel=judge.kernel, rows=len(prepared.rows), rows_cut=prepared.cut)
    if prepared.cut:
        on_event(Remark(_cut_remark(prepared, settings.max_length)))

    found = checkpoints(run.checkpoints)
    resume_from = found[-1] if found else None
    done = 0 if resume_from is None else step_of(resume_from)
    rewind(run, done)
    log = _Log(config, run, judge, timings, on_event, stopping)
    if not any(row.get("phase") == "before" for row in run.metrics()):
        log.answers(0, "before", lambda p: judge.base(p))

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
    log.model = trained
    try:
        with timings.phase("training"):
            history = train(
                trained,
                tokenizer,
                prepared.rows,
                settings,
                config.seed,
                callbacks=[log],
                output_dir=run.checkpoints,
                resume_from=resume_from,
                autocast=config.full and config.dtype == "bfloat16",
            )
    except NonFiniteError as error:
        run.log_finding(
            {
                "what": "training stopped at a number that is not finite",
                "why": str(error),
                "advice": "adapter/ holds the weights of the step before; a lower learning rate "
                "or a longer warm-up usually cures it",
            }
        )
        save_trained(trained, tokenizer, config.model, run)
        raise
    if history.notes:
        run.note(notes=list(history.notes))
        for note in history.notes:
            on_event(Remark(note))
    with timings.phase("saving"):
        save_trained(trained, tokenizer, config.model, run)
    if history.complete:
        log.answers(history.steps, "after", lambda p: judge.trained(trained, p))
    on_event(TrainingEnded(history.complete, history.steps))
    return FineTuned(history.complete, history.steps, history.losses)


def trainable(model: Any, tokenizer: Any, config: SftConfig, rows: Sequence[Row], run: Run) -> Any:
    """The model with its adapter attached and started, or itself with every weight in float32."""
    if config.adapter is None:
        # In bf16 most updates are smaller than the weight's last bit and would be lost.
        return model.float().requires_grad_(True)
    from loralab.adapters.attach import attach

    attached = attach(model, config.adapter, config.seed)
    init = config.adapter.init
    if init.name != "zero_b":
        from loralab.adapters.inits import initialize

        texts = [tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in rows[:_TEXTS]]
        report = initialize(
            attached,
            init.name,
            tokenizer=tokenizer,
            texts=texts,
            seed=config.seed,
            **init.options,
        )
        run.note(init={"name": init.name, **report.figures})
    return attached


def _cut_remark(prepared: Prepared, max_length: int) -> str:
    return (
        f"{prepared.cut} of {len(prepared.rows)} rows are longer than training.max_length "
        f"{max_length} and lose their end, end token included"
    )


class _Log(TrainerCallback):  # type: ignore[misc]
    """Writes each step and evaluation into the run directory, and stops when asked to."""

    def __init__(
        self,
        config: SftConfig,
        run: Run,
        judge: Judge,
        timings: Timings,
        on_event: OnTrainingEvent,
        stopping: Callable[[], bool],
    ) -> None:
        self.model: Any = None
        self._config = config
        self._run = run
        self._judge = judge
        self._timings = timings
        self._on_event = on_event
        self._stopping = stopping
        self._tokens = 0
        self._seconds: list[float] = []

    def answers(self, step: int, phase: str, ask: Callable[[Any], list[Rollout]]) -> dict[str, Any]:
        """Ask, write the completions down, and say how it went; what it adds to the metrics."""
        if not self._judge.batch.examples:
            return {}
        with self._timings.phase("evaluation"):
            rollouts = ask(lambda done, of: self._on_event(Answering(done, of)))
        shown = rollouts[:SHOWN_DURING] if phase == "during" else rollouts
        rows = [
            {"step": step, **{k: v for k, v in row.items() if k != "generation"}}
            for row in completion_rows(self._judge.batch, shown, step, phase)
        ]
        scores = score_row(rollouts)
        self._run.log_completions(rows)
        if phase != "during":
            self._run.log_metrics({"step": step, "phase": phase, **scores})
        self._on_event(
            Answered(
                step=step,
                reward=scores["held_out_reward"],
                correct=scores["held_out_correct"],
                prompt=plain(rollouts[0].prompt),
                completion=rollouts[0].text,
            )
        )
        return scores

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._tokens = state.num_input_tokens_seen

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._stopping() and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        step, of, seconds = state.global_step, state.max_steps, float(logs["seconds"])
        self._seconds.append(seconds)
        tokens = logs["tokens"] - self._tokens
        self._tokens = logs["tokens"]
        row = {
            "step": step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
            "lr": logs["learning_rate"],
            "tokens": logs["tokens"],
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds > 0 else None,
        }
        every = self._config.evaluation.every
        tested = every is not None and step % every == 0 and step < of
        if tested:
            row |= self.answers(step, "during", lambda p: self._judge.trained(self.model, p))
        if tested or step % self._config.training.log_every == 0 or step in (1, of):
            self._run.log_metrics(row)
            self._timings.save(self._run.timings_path)
        self._on_event(
            StepDone(
                step=step,
                of=of,
                loss=row["loss"],
                grad_norm=row["grad_norm"],
                lr=row["lr"],
                tokens_per_second=row["tokens_per_second"] or 0.0,
                time_left=sum(self._seconds) / len(self._seconds) * (of - step),
            )
        )
