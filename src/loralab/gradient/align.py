"""A DPO run: from a config to a run directory, resumable at every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from loralab.config.dpo import DpoConfig
from loralab.errors import UserError
from loralab.gradient.answers import Answers
from loralab.gradient.diary import Diary
from loralab.gradient.dpo import (
    COLUMNS,
    Layout,
    PairRow,
    PreparedPairs,
    Reference,
    preference,
    prepare_pairs,
    reference_of,
    train_pairs,
)
from loralab.gradient.events import (
    OnTrainingEvent,
    Remark,
    TrainingEnded,
    TrainingStarted,
    ignore,
)
from loralab.gradient.fine_tune import FineTuned, trainable
from loralab.gradient.forward import causal_of
from loralab.gradient.guarded import guards
from loralab.gradient.judge import Judge
from loralab.gradient.loop import quiet, total_steps
from loralab.gradient.outputs import kept_when_not_finite, pass_on, resumed, save_trained
from loralab.gradient.preferences import Parsed, Preferences
from loralab.run import Run
from loralab.timings import Timings


def align(
    config: DpoConfig,
    run: Run,
    on_event: OnTrainingEvent = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> FineTuned:
    """Train on pairs as the config says in a run directory, or go on with what is there.

    Metrics of a step: loss, margin, accuracy, chosen_reward, rejected_reward. Of an evaluation:
    held_out_reward (the mean margin of held-out pairs), held_out_std and held_out_correct (the
    share with the chosen answer ahead); before any step they are 0 and a half by definition when
    the model starts as its reference.

    stopping: asked after every step; True saves a checkpoint and ends the run early.

    Raises:
        NonFiniteError: a loss or gradient is not finite; `adapter/` holds the weights before it.
        UserError: something the user can mend; the run can be resumed afterwards.
    """
    with Timings.of_run(run.timings_path) as timings:
        return _align(config, run, on_event, stopping, timings)


def _align(
    config: DpoConfig,
    run: Run,
    on_event: OnTrainingEvent,
    stopping: Callable[[], bool],
    timings: Timings,
) -> FineTuned:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    settings = config.training
    data = Preferences(config.data, config.seed)
    with timings.phase("server_launch"):
        from loralab.models.load import load

        model, tokenizer = load(config.model, config.dtype, config.device, config.quantization)
        parsed = data.pairs("train")
        prepared = prepare_pairs(parsed.pairs, tokenizer, settings.max_length)
        tested = data.pairs(config.evaluation.split).pairs[: config.evaluation.limit]
        held_out = prepare_pairs(tested, tokenizer, settings.max_length).rows
        judge = Judge(model, tokenizer, data, config, limit=config.dpo.texts if run.leads else 0)
    if not prepared.rows:
        raise UserError(f"{config.data.path}: no pair is left to train on: {_left_out(parsed)}")
    run.note(
        kernel=judge.kernel,
        rows=len(prepared.rows),
        rows_cut=prepared.cut,
        pairs_dropped={**parsed.dropped, "too long": prepared.too_long},
    )
    for remark in _remarks(prepared, parsed, settings.max_length):
        on_event(Remark(remark))

    resume_from, done = resumed(run)
    answers = Answers(run, judge, timings, on_event)
    untouched = run.leads and not any(row.get("phase") == "before" for row in run.metrics())
    texts = judge.base() if untouched else []

    rows = [row for pair in prepared.rows for row in (pair.chosen, pair.rejected)]
    with timings.phase("init_population"), quiet():
        trained = trainable(model, tokenizer, config, rows[::2], run)
    reference = reference_of(trained, config.dpo.reference)
    layout = Layout.of(causal_of(trained), tokenizer, settings)

    def measured() -> dict[str, Any]:
        with timings.phase("evaluation"):
            return _held_out(trained, layout, held_out, config, reference)

    if untouched:
        answers.take(0, "before", lambda _: texts, measured())
    on_event(
        TrainingStarted(
            model=config.model,
            task=data.name,
            rows=len(prepared.rows),
            tokens=sum(len(row.input_ids) for row in rows),
            learned=sum(row.learned for row in rows),
            parameters=sum(p.numel() for p in trained.parameters() if p.requires_grad),
            steps=total_steps(len(prepared.rows), settings),
            resumed_at=done or None,
        )
    )
    diary = Diary(
        config, run, timings, on_event, stopping, lambda step: measured(), columns=COLUMNS
    )
    with timings.phase("training"), kept_when_not_finite(trained, tokenizer, config.model, run):
        history = train_pairs(
            trained,
            tokenizer,
            prepared.rows,
            settings,
            config.dpo,
            config.seed,
            callbacks=[diary, *guards(config, run.path, tokenizer, on_event)],
            output_dir=run.checkpoints,
            reference=reference,
            resume_from=resume_from,
            autocast=config.full and config.dtype == "bfloat16",
        )
    pass_on(history.notes, run, on_event)
    with timings.phase("saving"):
        save_trained(trained, tokenizer, config.model, run)
    if history.complete and run.leads:
        after = measured()
        answers.take(history.steps, "after", lambda p: judge.trained(trained, p), after)
    on_event(TrainingEnded(history.complete, history.steps))
    return FineTuned(history.complete, history.steps, history.losses)


def _held_out(
    model: Any,
    layout: Layout,
    rows: Sequence[PairRow],
    config: DpoConfig,
    reference: Reference,
) -> dict[str, Any]:
    if not rows:
        return {}
    with quiet():
        size = config.training.batch_size
        found = preference(model, layout, rows, size, config.dpo.beta, reference)
    return {
        "held_out_reward": found.margin,
        "held_out_std": found.margin_std,
        "held_out_correct": found.accuracy,
    }


def _remarks(prepared: PreparedPairs, parsed: Parsed, max_length: int) -> list[str]:
    said = []
    if parsed.dropped:
        said.append(f"pairs left out: {_left_out(parsed)}")
    if prepared.too_long:
        said.append(
            f"{prepared.too_long} pairs left out: their prompt alone fills training.max_length "
            f"{max_length}"
        )
    if prepared.cut:
        said.append(
            f"{prepared.cut} of {len(prepared.rows)} pairs have an answer that loses its end, end "
            f"token included, to training.max_length {max_length}"
        )
    return said


def _left_out(parsed: Parsed) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in parsed.dropped.items()) or "none"
