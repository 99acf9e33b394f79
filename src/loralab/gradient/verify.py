"""A verifier's run: solutions sampled, a head and an adapter trained on them, candidates picked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loralab import durable, tasks
from loralab.config.verifier import VerifierConfig
from loralab.errors import UserError
from loralab.gradient.diary import Diary
from loralab.gradient.dpo import Layout
from loralab.gradient.events import (
    Answered,
    Answering,
    OnTrainingEvent,
    Remark,
    TrainingEnded,
    TrainingStarted,
    ignore,
)
from loralab.gradient.fine_tune import FineTuned, trainable
from loralab.gradient.guarded import guards
from loralab.gradient.loop import quiet, total_steps
from loralab.gradient.outputs import kept_when_not_finite, pass_on, resumed, save_trained
from loralab.gradient.rows import IGNORED
from loralab.gradient.solutions import Sampler, fitting, stored
from loralab.gradient.verifier import (
    COLUMNS,
    Picked,
    Solution,
    Verifier,
    balanced,
    check_lm_weight,
    load_head,
    new_head,
    pick,
    train_verifier,
)
from loralab.rollouts import plain
from loralab.run import Run
from loralab.tasks.base import Example, Task
from loralab.tasks.metrics import Estimate
from loralab.timings import Timings

TRAINING, HELD_OUT, SCORES = "solutions.jsonl", "candidates.jsonl", "scores.jsonl"
"""Files of the run: training solutions, held-out candidates, and the candidates' final scores."""
HEAD = Path("verifier") / "head.safetensors"


def verify(
    config: VerifierConfig,
    run: Run,
    on_event: OnTrainingEvent = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> FineTuned:
    """Sample, label and learn as the config says in a run directory, or go on with what is there.

    Metrics of an evaluation, all over the same held-out candidates: verify (correct when the
    verifier picks), majority, pass_at_1, pass_at_n, over_pass_at_1, over_majority, auc, and the
    standard errors of all but the last in `errors`; held_out_reward and held_out_correct are
    `verify`, which before any training is pass_at_1: a verifier that knows nothing picks blindly.

    Raises:
        NonFiniteError: a loss or gradient is not finite; `adapter/` holds the weights before it.
        UserError: something the user can mend; the run can be resumed afterwards.
    """
    with Timings.of_run(run.timings_path) as timings:
        return _verify(config, run, on_event, stopping, timings)


def load_verifier(directory: Path, config: VerifierConfig) -> tuple[Verifier, Any]:
    """The verifier that a run left in its directory, and its tokenizer.

    Raises:
        UserError: the run has none, or it does not fit the model.
    """
    from peft import PeftModel

    from loralab.models.load import load

    source = str(directory / "model") if config.full else config.model
    model, tokenizer = load(source, config.dtype, config.device, config.quantization)
    layout = Layout.of(model, tokenizer, config.training)
    judge: Any = model
    if not config.full:
        try:
            judge = PeftModel.from_pretrained(model, str(directory / "adapter"))
        except (OSError, ValueError) as error:
            raise UserError(f"{directory / 'adapter'}: cannot be loaded: {error}") from error
    head = load_head(judge, directory / HEAD)
    return Verifier(judge.eval(), head, layout, config.training.batch_size), tokenizer


def _verify(
    config: VerifierConfig,
    run: Run,
    on_event: OnTrainingEvent,
    stopping: Callable[[], bool],
    timings: Timings,
) -> FineTuned:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    settings, wanted = config.training, config.evaluation
    task = tasks.get(config.task.name, **config.task.options)
    examples = {example.id: example for example in task.examples(wanted.split)[: wanted.limit]}
    if not examples:
        raise UserError(f"task {task.name}: the {wanted.split} split has no examples")
    with timings.phase("server_launch"):
        from loralab.models.load import load

        model, tokenizer = load(config.model, config.dtype, config.device, config.quantization)
        check_lm_weight(model, config.verifier)
    with timings.phase("generation"):
        sampler = Sampler(model, tokenizer, task, config)
        sampled, candidates = _sampled(
            sampler, list(examples.values()), task, config, run, on_event
        )
        run.note(kernel=sampler.kernel)
        del sampler  # and with it the engine's copy of the weights
    solutions, too_long = fitting(sampled, settings.max_length)
    rights = sum(one.right for group in sampled for one in group)
    count = sum(map(len, sampled))
    on_event(Remark(f"{count} solutions sampled, {rights} of them right"))
    if too_long:
        on_event(
            Remark(
                f"{too_long} of {count} solutions are longer than training.max_length "
                f"{settings.max_length} and are not learned from"
            )
        )
    if config.solutions.balance:
        solutions = balanced(solutions, config.seed)
    run.note(rows=len(solutions), sampled=count, right=rights, too_long=too_long)

    resume_from, done = resumed(run)
    with timings.phase("init_population"), quiet():
        layout = Layout.of(model, tokenizer, settings)
        trained = trainable(model, tokenizer, config, [one.row for one in solutions], run)
    verifier = Verifier(trained, new_head(trained), layout, settings.batch_size)

    def chosen(step: int, phase: str) -> dict[str, Any]:
        if not run.leads:
            return {}
        # A head of zeros gives every candidate a half: there is nothing to run.
        scores = [[0.5] * len(group) for group in candidates]
        if phase != "before":
            with timings.phase("evaluation"), quiet():
                scores = [verifier.score([one.row for one in group]) for group in candidates]
        picked = pick(candidates, scores)
        row = _row(picked, blind=phase == "before")
        rows, shown = [], []
        for group, given in zip(candidates, scores, strict=True):
            best = max(range(len(group)), key=given.__getitem__)
            shown.append(group[best])
            rows.append({"example": group[0].example, "scores": given})
        if phase == "after":
            run.write(SCORES, "".join(json.dumps(one) + "\n" for one in rows))
            on_event(Remark(said(picked, config.verifier.candidates)))
        if phase != "during":
            run.log_completions(_shown(task, examples, tokenizer, shown, step, phase, config))
            run.log_metrics({"step": step, "phase": phase, **row})
        first = examples[shown[0].example]
        on_event(
            Answered(
                step=step,
                reward=row["held_out_reward"],
                correct=row["held_out_correct"],
                prompt=plain(task.prompt(first)),
                completion=_text(tokenizer, shown[0]),
            )
        )
        return row

    if not any(row.get("phase") == "before" for row in run.metrics()):
        chosen(0, "before")
    on_event(
        TrainingStarted(
            model=config.model,
            task=task.name,
            rows=len(solutions),
            tokens=sum(len(one.row.input_ids) for one in solutions),
            learned=sum(one.row.learned for one in solutions),
            parameters=sum(p.numel() for p in trained.parameters() if p.requires_grad),
            steps=total_steps(len(solutions), settings),
            resumed_at=done or None,
        )
    )
    diary = Diary(
        config,
        run,
        timings,
        on_event,
        stopping,
        evaluate=lambda step: chosen(step, "during"),
        columns=COLUMNS,
    )
    with timings.phase("training"), kept_when_not_finite(trained, tokenizer, config.model, run):
        history = train_verifier(
            verifier,
            solutions,
            settings,
            config.verifier,
            config.seed,
            callbacks=[diary, *guards(config, run.path, tokenizer, on_event)],
            output_dir=run.checkpoints,
            layout=layout,
            resume_from=resume_from,
            autocast=config.full and config.dtype == "bfloat16",
        )
    pass_on(history.notes, run, on_event)
    with timings.phase("saving"):
        save_trained(trained, tokenizer, config.model, run)
        if run.leads:
            durable.publish(run.path / HEAD.parent, lambda draft: verifier.save(draft / HEAD.name))
    if history.complete:
        chosen(history.steps, "after")
    on_event(TrainingEnded(history.complete, history.steps))
    return FineTuned(history.complete, history.steps, history.losses)


def _sampled(
    sampler: Sampler,
    held_out: Sequence[Example],
    task: Task,
    config: VerifierConfig,
    run: Run,
    on_event: OnTrainingEvent,
) -> tuple[list[list[Solution]], list[list[Solution]]]:
    """Solutions to learn from and candidates to pick from, each by example."""

    def progress(done: int, of: int) -> None:
        on_event(Answering(done, of))

    def training() -> list[list[Solution]]:
        learned = task.examples("train")[: config.solutions.examples]
        return sampler.solutions("train", learned, config.solutions.samples, progress)

    def candidates() -> list[list[Solution]]:
        count = config.verifier.candidates
        return sampler.solutions(config.evaluation.split, held_out, count, progress)

    return stored(run, TRAINING, training), stored(run, HELD_OUT, candidates)


def _row(picked: Picked, blind: bool) -> dict[str, Any]:
    scores = dict(picked.scores)
    if blind:
        # It picks any candidate: what that is worth on average is known without drawing one.
        zero = Estimate(0.0, None)
        scores |= {"verify": scores["pass_at_1"], "over_pass_at_1": zero}
        del scores["over_majority"]
    return {
        "held_out_reward": scores["verify"].value,
        "held_out_correct": scores["verify"].value,
        **{name: score.value for name, score in scores.items()},
        "auc": picked.auc,
        "errors": {name: score.error for name, score in scores.items()},
    }


def said(picked: Picked, candidates: int) -> str:
    """The ways to pick side by side, each with its standard error over the examples."""

    def shown(name: str, sign: str = "") -> str:
        score = picked.scores[name]
        error = "" if score.error is None else f" ± {score.error:.3f}"
        return f"{score.value:{sign}.3f}{error}"

    return (
        f"verify@{candidates} {shown('verify')}, majority {shown('majority')}, pass@1 "
        f"{shown('pass_at_1')}, any of {candidates} {shown('pass_at_n')}; verify is "
        f"{shown('over_pass_at_1', '+')} over pass@1, {shown('over_majority', '+')} over majority"
    )


def _text(tokenizer: Any, one: Solution) -> str:
    tokens = [label for label in one.row.labels if label != IGNORED]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _shown(
    task: Task,
    examples: Mapping[str, Example],
    tokenizer: Any,
    shown: Sequence[Solution],
    step: int,
    phase: str,
    config: VerifierConfig,
) -> list[dict[str, Any]]:
    """Lines of completions.jsonl: the candidate picked of each held-out example."""
    rows = []
    for one in shown:
        example = examples[one.example]
        prompt = task.prompt(example)
        rows.append(
            {
                "step": step,
                "phase": phase,
                "split": config.evaluation.split,
                "example": one.example,
                "prompt": prompt if isinstance(prompt, str) else list(prompt),
                "gold": task.gold(example),
                "completion": _text(tokenizer, one),
                "reward": float(one.right),
                "correct": one.right,
            }
        )
    return rows
