"""A GRPO run: from a config to a run directory, resumable at every checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from loralab import tasks
from loralab.config.grpo import GrpoConfig
from loralab.engines.base import Request
from loralab.engines.prompts import PromptEncoder
from loralab.errors import UserError
from loralab.gradient.answers import Answers
from loralab.gradient.diary import Diary
from loralab.gradient.events import (
    OnTrainingEvent,
    Remark,
    TrainingEnded,
    TrainingStarted,
    ignore,
)
from loralab.gradient.fine_tune import FineTuned, trainable
from loralab.gradient.grpo import COLUMNS, Group, Sampled, train_policy
from loralab.gradient.guarded import guards
from loralab.gradient.judge import Judge
from loralab.gradient.live import LiveEngine
from loralab.gradient.loop import quiet
from loralab.gradient.outputs import kept_when_not_finite, pass_on, resumed, save_trained
from loralab.gradient.rows import IGNORED, Row
from loralab.rollouts import Batch, Rollout, completion_rows
from loralab.run import Run
from loralab.tasks.base import Task
from loralab.timings import Timings

_TEXTS = 64
"""Prompts that an initialisation which looks at text is given."""


def reinforce(
    config: GrpoConfig,
    run: Run,
    on_event: OnTrainingEvent = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> FineTuned:
    """Train on a task's reward as the config says in a run directory, or go on with what is there.

    A line of the metrics counts `completions` since the beginning, so that runs of several kinds
    can be laid over each other at equal samples.

    stopping: asked after every step; True saves a checkpoint and ends the run early.

    Raises:
        NonFiniteError: a loss or gradient is not finite; `adapter/` holds the weights before it.
        UserError: something the user can mend; the run can be resumed afterwards.
    """
    with Timings.of_run(run.timings_path) as timings:
        return _reinforce(config, run, on_event, stopping, timings)


def _reinforce(
    config: GrpoConfig,
    run: Run,
    on_event: OnTrainingEvent,
    stopping: Callable[[], bool],
    timings: Timings,
) -> FineTuned:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    settings = config.training
    task = tasks.get(config.task.name, **config.task.options)
    with timings.phase("server_launch"):
        from loralab.models.load import load

        model, tokenizer = load(config.model, config.dtype, config.device, config.quantization)
        live = LiveEngine(model, tokenizer, config)
        judge = Judge(model, tokenizer, task, config, engine=live)
    source = _Source(config, task, tokenizer, live, run, timings, on_event)
    run.note(kernel=live.kernel, rows=len(source.examples))

    resume_from, done = resumed(run)
    answers = Answers(run, judge, timings, on_event)
    answers.before()

    with timings.phase("init_population"), quiet():
        trained = trainable(model, tokenizer, config, source.prompt_rows(_TEXTS), run)
    on_event(
        TrainingStarted(
            model=config.model,
            task=task.name,
            rows=len(source.examples),
            tokens=0,
            learned=0,
            parameters=sum(p.numel() for p in trained.parameters() if p.requires_grad),
            steps=settings.steps or 0,
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
        columns=COLUMNS,
    )
    with timings.phase("training"), kept_when_not_finite(trained, tokenizer, config.model, run):
        history = train_policy(
            trained,
            tokenizer,
            source,
            settings,
            config.grpo,
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


class _Source:
    """Completions of training prompts by the model in training, scored by the task."""

    def __init__(
        self,
        config: GrpoConfig,
        task: Task,
        tokenizer: Any,
        live: LiveEngine,
        run: Run,
        timings: Timings,
        on_event: OnTrainingEvent,
    ) -> None:
        self.examples = tuple(task.examples("train"))
        if not self.examples:
            raise UserError(f"task {task.name}: the train split has no examples")
        self._config = config
        self._task = task
        self._live = live
        self._run = run
        self._timings = timings
        self._on_event = on_event
        self._told_of_cut = False
        self._encoder = PromptEncoder(tokenizer)
        self._settings = config.generation.model_copy(
            update={"temperature": config.grpo.temperature, "top_k": 0, "top_p": 1.0}
        )

    def __call__(self, model: Any, number: int) -> Sequence[Group]:
        """The groups of a batch of prompts.

        Raises:
            UserError: no completion could be made; says why of the first.
        """
        config = self._config
        examples = tuple(
            self.examples[place]
            for place in places(len(self.examples), config.training.batch_size, number, config.seed)
        )
        # A key for each place in the group: equal prompts with one seed would give equal texts.
        batches = [
            Batch(self._task, "train", examples, self._settings, f"{config.seed}|{number}|{member}")
            for member in range(config.grpo.group)
        ]

        def requests(adapter: str | None) -> list[Request]:
            return [request for batch in batches for request in batch.requests(adapter)]

        with self._timings.phase("generation"):
            answers = self._live.trained(model, requests)
        size = len(examples)
        groups: list[list[Sampled]] = [[] for _ in examples]
        failures = []
        for member, batch in enumerate(batches):
            given = answers[member * size : (member + 1) * size]
            for place, (rollout, answer) in enumerate(zip(batch.judge(given), given, strict=True)):
                row = self._row(rollout, answer.tokens)
                if answer.finish_reason == "error" or not row.learned:
                    failures.append(answer.error or "it is longer than training.max_length")
                    continue
                groups[place].append(Sampled(row, rollout.score.reward, rollout.score.correct))
            if member == 0:
                self._show(batch, batch.judge(given)[:1], number)
        if not any(groups):
            raise UserError(f"no completion could be sampled: {failures[0]}")
        return groups

    def prompt_rows(self, count: int) -> list[Row]:
        """Prompts alone, as rows with nothing to learn."""
        prompts = [self._encoder.encode(self._task.prompt(e)) for e in self.examples[:count]]
        return [Row(tuple(ids), (IGNORED,) * len(ids)) for ids in prompts]

    def _row(self, rollout: Rollout, tokens: Sequence[int]) -> Row:
        prompt = self._encoder.encode(rollout.prompt)
        most = self._config.training.max_length
        ids = (*prompt, *tokens)
        if len(ids) > most and not self._told_of_cut:
            self._told_of_cut = True
            self._on_event(
                Remark(
                    f"completions that go beyond training.max_length {most} are scored whole and "
                    f"learned without their end, the first after example {rollout.example.id}"
                )
            )
        return Row(ids[:most], ((IGNORED,) * len(prompt) + tuple(tokens))[:most])

    def _show(self, batch: Batch, rollouts: Sequence[Rollout], number: int) -> None:
        step = number * self._config.grpo.updates + 1
        rows = completion_rows(batch, rollouts, step, "training")
        self._run.log_completions(
            {"step": step, **{k: v for k, v in row.items() if k != "generation"}} for row in rows
        )


def places(count: int, size: int, number: int, seed: int) -> list[int]:
    """Which of `count` examples are in a batch: each pass goes through all in an order of its own,
    and depends on the seed alone."""
    first = number * size
    found = []
    for place in range(first, first + size):
        passed, at = divmod(place, count)
        order = list(range(count))
        random.Random(f"{seed}|{passed}").shuffle(order)
        found.append(order[at])
    return found
