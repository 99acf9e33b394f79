"""Each step of a training run, written into its directory as it is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralab import ranks
from loralab.adapters.spline_watch import SplineWatch, decay_advice
from loralab.config.pretrain import PretrainConfig
from loralab.config.training import GradientConfig
from loralab.gradient.events import OnTrainingEvent, Remark, StepDone
from loralab.run import Run
from loralab.timings import Timings


class Diary(TrainerCallback):  # type: ignore[misc]
    """Writes each step and evaluation into the run directory, and stops when asked to.

    Of an LS-LoRA adapter each line has `spline_deviation`, `spline_outside` and the others of
    `SplineWatch.summary`; `splines.json` has them by layer, as training left them.
    evaluate: what an evaluation after this step adds to the step's line. columns: numbers of the
    trainer's own log that go into the line beside those of every kind.
    """

    def __init__(
        self,
        config: GradientConfig | PretrainConfig,
        run: Run,
        timings: Timings,
        on_event: OnTrainingEvent,
        stopping: Callable[[], bool],
        evaluate: Callable[[int], dict[str, Any]],
        columns: Sequence[str] = (),
    ) -> None:
        self._config = config
        self._run = run
        self._timings = timings
        self._on_event = on_event
        self._stopping = stopping
        self._evaluate = evaluate
        self._columns = tuple(columns)
        self._tokens = 0
        self._seconds: list[float] = []
        self._splines: SplineWatch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._tokens = state.num_input_tokens_seen
        self._splines = SplineWatch.of(more["model"], log_every=self._config.training.log_every)
        if self._splines is not None and args.weight_decay:
            self._on_event(Remark(decay_advice(args.weight_decay)))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._splines is not None:
            self._splines.before_step(state.global_step + 1, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._splines is not None:
            self._splines.after_step(state.global_step)
        # Every process has to stop after the same step, whichever got the signal.
        if ranks.agreed(self._stopping()) and state.global_step < state.max_steps:
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
            **{name: logs[name] for name in self._columns if name in logs},
        }
        every = self._config.evaluation.every
        tested = self._run.leads and every is not None and step % every == 0 and step < of
        if tested:
            row |= self._evaluate(step)
        due = step % self._config.training.log_every == 0 or step in (1, of)
        if due and self._splines is not None:
            # Of sharded splines every process has to be asked at the same steps.
            told = self._splines.summary()
            row |= {f"spline_{key}": value for key, value in told.items()}
        if tested or due:
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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._splines is not None:
            self._splines.end()
            layers = self._splines.by_layer()
            self._run.write("splines.json", json.dumps(layers, indent=1) + "\n")
