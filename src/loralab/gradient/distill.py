"""A teacher's completions, kept where the task scores them, as rows that `kind: sft` reads.

Rejection sampling from a model that knows more (RFT, arXiv:2308.01825, with a teacher). One row of
`distilled.jsonl`: prompt, completion, and where it comes from. A run that was stopped goes on with
the first batch of examples that is not whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from loralab import tasks
from loralab.config.distill import DistillConfig
from loralab.data.documents import Document
from loralab.durable import append_line
from loralab.engines.base import Completion, Engine
from loralab.errors import UserError
from loralab.gradient.contamination import contaminated
from loralab.gradient.events import Answering, OnTrainingEvent, Remark, ignore
from loralab.gradient.rejection import judged_by, scoring
from loralab.rollouts import Batch, Rollout, plain
from loralab.run import Run
from loralab.tasks.base import Example, Task
from loralab.tasks.documents import documents
from loralab.timings import Timings

ROWS = "distilled.jsonl"


@dataclass(frozen=True)
class Distilled:
    """complete: False if it stopped at a signal. kept: rows in the file."""

    complete: bool
    kept: int


def distill(
    config: DistillConfig,
    run: Run,
    on_event: OnTrainingEvent = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> Distilled:
    """Ask the teacher, judge, and keep, in a run directory; or go on with what is there.

    A line of the metrics is one batch of examples; its counts are since the beginning:
    completions, kept, solved (examples with a completion kept), cut (completions that scored but
    ended at max_new_tokens), failed.

    stopping: asked after every batch.

    Raises:
        UserError: something the user can mend; the run can be resumed afterwards.
    """
    with Timings.of_run(run.timings_path) as timings:
        return _distill(config, run, on_event, stopping, timings)


def _distill(
    config: DistillConfig,
    run: Run,
    on_event: OnTrainingEvent,
    stopping: Callable[[], bool],
    timings: Timings,
) -> Distilled:
    task = tasks.get(config.task.name, **config.task.options)
    examples = tuple(task.examples(config.split)[: config.examples])
    if not examples:
        raise UserError(f"task {task.name}: the {config.split} split has no examples")
    with timings.phase("data"):
        leaked = _leaked(config, task, examples, on_event)
    examples = tuple(example for example in examples if example.id not in leaked)
    if not examples:
        raise UserError(f"contamination: every {config.split} example of {task.name} was left out")
    with timings.phase("server_launch"):
        teacher, adapter = _teacher(config)
    run.note(kernel=getattr(teacher, "kernel", "unknown"))

    done = _rewound(run)
    totals = dict.fromkeys(("completions", "kept", "solved", "cut", "failed"), 0)
    if done:
        totals |= {name: run.metrics()[-1][name] for name in totals}
    batches = range(0, len(examples), config.batch)
    judged: list[tuple[Rollout, Completion]] = []
    for number in range(done, len(batches)):
        if stopping():
            return Distilled(False, totals["kept"])
        part = examples[batches[number] : batches[number] + config.batch]
        began = perf_counter()
        with timings.phase("generation"):
            judged = _judged(config, task, part, teacher, adapter, on_event)
        kept, cut = scoring(judged, config.min_reward)
        for rollout in kept:
            append_line(run.path / ROWS, _row(rollout, number))
        totals["completions"] += len(judged)
        totals["kept"] += len(kept)
        totals["solved"] += len({rollout.example.id for rollout in kept})
        totals["cut"] += cut
        totals["failed"] += sum(rollout.failed is not None for rollout, _ in judged)
        seconds = perf_counter() - began
        run.log_metrics({"step": number + 1, **totals, "seconds": seconds})
        timings.save(run.timings_path)
        on_event(
            Remark(
                f"batch {number + 1}/{len(batches)}: {totals['kept']} of {totals['completions']} "
                f"completions kept, {totals['solved']} examples solved"
            )
        )
    if not totals["kept"]:
        why = next((f", the first because {r.failed}" for r, _ in judged if r.failed), "")
        raise UserError(
            f"none of {totals['completions']} completions scored on {task.name} "
            f"({totals['failed']} failed{why}): sample more, lower min_reward, or take a better "
            "teacher"
        )
    return Distilled(True, totals["kept"])


def _leaked(
    config: DistillConfig, task: Task, examples: Sequence[Example], on_event: OnTrainingEvent
) -> frozenset[str]:
    """Examples whose prompt is one of the task's test split, which a student must not learn."""
    if config.contamination.action == "off":
        return frozenset()
    asked = [Document(example.id, plain(task.prompt(example))) for example in examples]
    own = {task.name: documents(task, "test")}
    return contaminated(asked, own, config.contamination, on_event)


def _teacher(config: DistillConfig) -> tuple[Engine, str | None]:
    if config.endpoint is not None:
        from loralab.engines.endpoint import EndpointEngine

        options = config.endpoint.model_dump()
        return EndpointEngine(options.pop("url"), config.model, **options), None
    from loralab.evaluate import engine_of
    from loralab.subject import subject_of

    subject = subject_of(config.model, config.adapter, config.dtype, config.device)
    if config.quantization is not None:
        subject = replace(subject, quantization=config.quantization)
    return engine_of(subject)


def _judged(
    config: DistillConfig,
    task: Task,
    examples: tuple[Example, ...],
    teacher: Engine,
    adapter: str | None,
    on_event: OnTrainingEvent,
) -> list[tuple[Rollout, Completion]]:
    """Every completion of a batch of examples with what the task makes of it."""
    batches = [
        Batch(task, config.split, examples, config.generation, f"{config.seed}|distill|{sample}")
        for sample in range(config.samples)
    ]
    requests = [request for batch in batches for request in batch.requests(adapter)]
    answers = teacher.generate(requests, lambda done, of: on_event(Answering(done, of)))
    return judged_by(batches, answers)


def _row(rollout: Rollout, batch: int) -> dict[str, Any]:
    prompt = rollout.prompt
    return {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "completion": rollout.text,
        "example": rollout.example.id,
        "reward": rollout.score.reward,
        "batch": batch,
    }


def _rewound(run: Run) -> int:
    """Batches that are whole; rows of one that is not are forgotten."""
    done = len(run.metrics())
    path = run.path / ROWS
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        whole = [line for line in lines if _batch_of(line) < done]
        if len(whole) < len(lines):
            run.write(ROWS, "".join(line + "\n" for line in whole))
    return done


def _batch_of(line: str) -> float:
    try:
        return float(json.loads(line)["batch"])
    except ValueError:  # torn by a crash
        return float("inf")
