"""A task's score of a model, with or without an adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal

from loralab.config import GenerationConfig
from loralab.engines.base import Engine, Progress
from loralab.errors import UserError
from loralab.rollouts import Batch, Rollout, completion_row, share_correct
from loralab.run import Run
from loralab.subject import Opened, Subject, subject_of
from loralab.tasks.base import Example, Measured, Split, Task
from loralab.tasks.metrics import Estimate, bootstrap, mean_of, passes, share_of

if TYPE_CHECKING:
    from loralab.engines.likelihood import Likelihood

CHUNK = 512
"""Completions that are made before they are judged and handed on."""


@dataclass(frozen=True)
class Evaluation:
    """Judged completions of one split.

    rollouts: by example, each example's `samples` one after the other. reward, reward_std: over
    completions. correct: share of those the task judges, None if none. metrics: the task's own
    numbers (F1, ROUGE), of completions that could be made; {} without any. scores: every number
    with its error over examples: "reward", "correct", "pass@k", and the task's own.
    """

    task: str
    split: Split
    rollouts: Sequence[Rollout]
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: int = 1
    scores: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def reward(self) -> float:
        return fmean(r.score.reward for r in self.rollouts)

    @property
    def reward_std(self) -> float:
        return pstdev(r.score.reward for r in self.rollouts)

    @property
    def correct(self) -> float | None:
        return share_correct(self.rollouts)

    @property
    def examples(self) -> int:
        return len(self.rollouts) // self.samples

    @property
    def failed(self) -> int:
        """Completions that could not be generated or scored; they count at the reward floor."""
        return sum(r.failed is not None for r in self.rollouts)

    def numbers(self) -> dict[str, Any]:
        """Plain values for JSON, without the completions."""
        return {
            "task": self.task,
            "split": self.split,
            "examples": self.examples,
            "samples": self.samples,
            "reward": self.reward,
            "reward_std": self.reward_std,
            "correct": self.correct,
            "failed": self.failed,
            "metrics": dict(self.metrics),
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the completions included."""
        return {**self.numbers(), "completions": _rows(self.rollouts, self.samples)}


def evaluate(
    engine: Engine,
    task: Task,
    settings: GenerationConfig,
    adapter: str | None = None,
    split: Split = "test",
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    samples: int = 1,
    k: Sequence[int] = (),
    judged: Callable[[Sequence[Rollout]], None] | None = None,
) -> Evaluation:
    """Generate and score a split's first `limit` examples (None: all).

    adapter: name of one the engine has loaded; None is the base model. samples: completions of
    each example. k: for each of these pass@k, the chance that one of k completions is right, by
    the estimator without bias (Chen et al. 2021). judged: is given the completions as they are
    done, some hundreds at a time, in the order of `Evaluation.rollouts`.

    Raises:
        UserError: nothing to evaluate, or samples and k that do not go with the rest.
    """
    examples = wanted(task, settings, split, limit, samples, k)
    rollouts: list[Rollout] = []
    at_once = max(1, CHUNK // samples)
    for at in range(0, len(examples), at_once):
        part = examples[at : at + at_once]
        batches = [Batch(task, split, part, settings, _key(seed, n)) for n in range(samples)]
        requests = [request for batch in batches for request in batch.requests(adapter)]
        answers = engine.generate(requests, _shifted(progress, at * samples, examples, samples))
        by_sample = [
            batch.judge(answers[n * len(part) : (n + 1) * len(part)])
            for n, batch in enumerate(batches)
        ]
        done = [rollout for group in zip(*by_sample, strict=True) for rollout in group]
        rollouts += done
        if judged is not None:
            judged(done)
    metrics = metrics_of(task, rollouts)
    scores = _scores(task, rollouts, samples, k, metrics)
    return Evaluation(task.name, split, rollouts, metrics, samples, scores)


def evaluate_into(
    run: Run,
    engine: Engine,
    task: Task,
    settings: GenerationConfig,
    shots: int | None = None,
    **how: Any,
) -> Evaluation:
    """As `evaluate`, and written down: a line of completions.jsonl for each completion, as they are
    done, and at the end one of metrics.jsonl.

    shots: of the task, for the lines. how: the other arguments of `evaluate`.
    """
    samples: int = how.get("samples", 1)

    def keep(rollouts: Sequence[Rollout]) -> None:
        golds = (task.gold(rollout.example) for rollout in rollouts)
        run.log_completions(
            {"shots": shots, **row, "gold": gold}
            for row, gold in zip(_rows(rollouts, samples), golds, strict=True)
        )

    began = time.perf_counter()
    result = evaluate(engine, task, settings, judged=keep, **how)
    run.log_metrics({"shots": shots, **result.numbers(), "seconds": time.perf_counter() - began})
    return result


def _rows(rollouts: Sequence[Rollout], samples: int) -> list[dict[str, Any]]:
    return [{"sample": n % samples, **completion_row(r)} for n, r in enumerate(rollouts)]


def metrics_of(task: Task, rollouts: Sequence[Rollout]) -> Mapping[str, float]:
    """A task's own numbers over what was answered; {} where it has none. Failures count as
    empty answers."""
    if not isinstance(task, Measured) or not rollouts:
        return {}
    return task.metrics(_answered(rollouts))


def _answered(rollouts: Sequence[Rollout]) -> list[tuple[Example, str]]:
    return [(r.example, "" if r.failed else r.text) for r in rollouts]


def wanted(
    task: Task,
    settings: GenerationConfig,
    split: Split = "test",
    limit: int | None = None,
    samples: int = 1,
    k: Sequence[int] = (),
) -> tuple[Example, ...]:
    """The examples that `evaluate` takes; known without a model. Raises UserError as it does."""
    examples = tuple(task.examples(split)[:limit])
    if not examples:
        raise UserError(f"task {task.name}: the {split} split has no examples to evaluate")
    task.prompt(examples[0])
    if samples < 1:
        raise UserError(f"samples is {samples}, expected 1 or more")
    if samples > 1 and settings.temperature == 0:
        raise UserError(
            f"samples is {samples} at temperature 0, where all of an example are the same: set a "
            "temperature, such as 0.8"
        )
    for one in k:
        if not 1 <= one <= samples:
            raise UserError(f"pass@{one} needs {max(one, 1)} samples or more, not {samples}")
    if k and task.score(examples[0], "").correct is None:
        raise UserError(f"task {task.name} calls no answer right or wrong: it has no pass@{k[0]}")
    return examples


def _key(seed: int, sample: int) -> str:
    return str(seed) if sample == 0 else f"{seed}|{sample}"


def _shifted(
    progress: Progress | None, before: int, examples: Sequence[Example], samples: int
) -> Progress | None:
    if progress is None:
        return None
    of = len(examples) * samples
    return lambda done, _: progress(before + done, of)


def _scores(
    task: Task,
    rollouts: Sequence[Rollout],
    samples: int,
    k: Sequence[int],
    metrics: Mapping[str, float],
) -> dict[str, Estimate]:
    """Errors are over examples: the completions of one are not independent."""
    problems = [rollouts[at : at + samples] for at in range(0, len(rollouts), samples)]
    scores = {"reward": mean_of([fmean(r.score.reward for r in group) for group in problems])}
    judged = [[bool(r.score.correct) for r in group] for group in problems]
    if all(r.score.correct is not None for r in rollouts):
        scores["correct"] = share_of([fmean(group) for group in judged])
    scores |= {f"pass@{one}": passes(judged, one) for one in k}
    if not metrics or not isinstance(task, Measured):
        return scores
    parts = [[r.score.parts for r in group] for group in problems]
    if all(metrics.keys() <= one.keys() for group in parts for one in group):
        # Means of what each completion scored: there is nothing to measure again.
        return scores | {
            name: mean_of([fmean(one[name] for one in group) for group in parts])
            for name in metrics
        }

    def measure(places: Sequence[int]) -> Mapping[str, float]:
        return task.metrics(_answered([r for place in places for r in problems[place]]))

    return scores | bootstrap(measure, len(problems))


def text_likelihood(
    subject: Subject, text: str, max_tokens: int | None = None, progress: Progress | None = None
) -> Likelihood:
    """Perplexity of a subject on a text.

    Raises:
        UserError: as `Subject.open`, or the text is too short.
    """
    from loralab.engines.likelihood import likelihood

    opened = subject.open()
    return likelihood(
        opened.model,
        opened.tokenizer,
        text,
        opened.state,
        max_tokens=max_tokens,
        progress=progress,
    )


def engine_of(subject: Subject, threads: int | None = None) -> tuple[Engine, str | None]:
    """An engine over a subject, and the name its adapter has there.

    Raises:
        UserError: as `Subject.open`.
    """
    return engine_over(subject.open(), subject.adapter or "", threads)


def engine_over(
    opened: Opened, adapter: str, threads: int | None = None
) -> tuple[Engine, str | None]:
    """As `engine_of`, over a subject in memory. adapter: the name for one beside the model."""
    from loralab.engines.batched import BatchedEngine

    # The native engine has its own copy of the base and knows of no adapter in it.
    backend: Literal["auto", "torch"] = "torch" if opened.changed else "auto"
    engine = BatchedEngine(opened.model, opened.tokenizer, backend, threads=threads)
    if opened.state is None:
        return engine, None
    engine.load({adapter: opened.state})
    return engine, adapter


def open_engine(
    model: str, dtype: str | None, device: str, adapter: str | None
) -> tuple[Engine, str | None]:
    """`engine_of` a model, or of what a run left in its directory, with an adapter on it."""
    return engine_of(subject_of(model, adapter, dtype, device))
