"""Held-out prompts answered before, during and after training, written into the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from loralab.evaluate import metrics_of
from loralab.gradient.events import Answered, Answering, OnTrainingEvent
from loralab.gradient.judge import Progress, score_row
from loralab.rollouts import Batch, Rollout, completion_rows, plain
from loralab.run import Run
from loralab.timings import Timings

SHOWN_DURING = 8
"""Held-out answers written down at each evaluation in between; before and after, all are."""


class Answerer(Protocol):
    """What answers held-out examples: the batched engine (`Judge`), or a model of another kind."""

    batch: Batch

    def base(self, progress: Progress | None = None) -> list[Rollout]:
        """Before the model is changed."""
        ...

    def trained(self, model: Any, progress: Progress | None = None) -> list[Rollout]:
        """As the model is now."""
        ...


class Answers:
    """Asks a judge and writes down what it hears."""

    def __init__(
        self, run: Run, judge: Answerer, timings: Timings, on_event: OnTrainingEvent
    ) -> None:
        self._run = run
        self._judge = judge
        self._timings = timings
        self._on_event = on_event

    def before(self) -> dict[str, Any]:
        """Of the base, unless a run that was stopped has them already."""
        if self._run.leads and any(row.get("phase") == "before" for row in self._run.metrics()):
            return {}
        return self.take(0, "before", self._judge.base)

    def of(self, model: Any, step: int, phase: str) -> dict[str, Any]:
        """Of the model as it is now."""
        return self.take(step, phase, lambda progress: self._judge.trained(model, progress))

    def take(
        self,
        step: int,
        phase: str,
        ask: Callable[[Any], list[Rollout]],
        measured: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Ask, write the completions down, and say how it went; what it adds to the metrics, the
        task's own (held_out_f1, held_out_rougeL) too.

        measured: held-out scores that do not come from the answers, in their place.
        """
        if not self._run.leads:
            return {}
        with self._timings.phase("evaluation"):
            rollouts = ask(lambda done, of: self._on_event(Answering(done, of)))
        own = metrics_of(self._judge.batch.task, rollouts)
        scores = {
            **score_row(rollouts),
            **{f"held_out_{name}": value for name, value in own.items()},
            **(measured or {}),
        }
        if not scores:
            return {}
        shown = rollouts[:SHOWN_DURING] if phase == "during" else rollouts
        rows = [
            {"step": step, **{k: v for k, v in row.items() if k != "generation"}}
            for row in completion_rows(self._judge.batch, shown, step, phase)
        ]
        self._run.log_completions(rows)
        if phase != "during":
            self._run.log_metrics({"step": step, "phase": phase, **scores})
        self._on_event(
            Answered(
                step=step,
                reward=scores["held_out_reward"],
                correct=scores["held_out_correct"],
                prompt=plain(rollouts[0].prompt) if rollouts else "",
                completion=rollouts[0].text if rollouts else "",
            )
        )
        return scores
