"""A task's score of a model, with or without an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from loralab.adapters.state import AdapterState
from loralab.adapters.targets import linear_weights
from loralab.config import GenerationConfig
from loralab.engines.base import Engine, Progress
from loralab.errors import UserError
from loralab.rollouts import Batch, Rollout, share_correct
from loralab.tasks.base import Measured, Split, Task

if TYPE_CHECKING:
    from loralab.engines.likelihood import Likelihood


@dataclass(frozen=True)
class Evaluation:
    """Judged completions of one split.

    reward, reward_std: over completions. correct: share of those the task judges, None if none.
    metrics: the task's own numbers (F1, ROUGE), of completions that could be made; {} without any.
    """

    task: str
    split: Split
    rollouts: Sequence[Rollout]
    metrics: Mapping[str, float] = field(default_factory=dict)

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
    def failed(self) -> int:
        """Completions that could not be generated or scored; they count at the reward floor."""
        return sum(r.failed is not None for r in self.rollouts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the completions included."""
        return {
            "task": self.task,
            "split": self.split,
            "examples": len(self.rollouts),
            "reward": self.reward,
            "reward_std": self.reward_std,
            "correct": self.correct,
            "failed": self.failed,
            "metrics": dict(self.metrics),
            "completions": [
                {
                    "example": r.example.id,
                    "prompt": r.prompt if isinstance(r.prompt, str) else list(r.prompt),
                    "completion": r.text,
                    "reward": r.score.reward,
                    "correct": r.score.correct,
                    "parts": dict(r.score.parts),
                    "failed": r.failed,
                }
                for r in self.rollouts
            ],
        }


def evaluate(
    engine: Engine,
    task: Task,
    settings: GenerationConfig,
    adapter: str | None = None,
    split: Split = "test",
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Generate and score a split's first `limit` examples (None: all).

    adapter: name of one the engine has loaded; None is the base model.
    """
    examples = tuple(task.examples(split)[:limit])
    if not examples:
        raise UserError(f"task {task.name}: the {split} split has no examples to evaluate")
    batch = Batch(task, split, examples, settings, str(seed))
    completions = engine.generate(batch.requests(adapter), progress)
    rollouts = batch.judge(completions)
    return Evaluation(task.name, split, rollouts, metrics_of(task, rollouts))


def metrics_of(task: Task, rollouts: Sequence[Rollout]) -> Mapping[str, float]:
    """A task's own numbers over what was answered; {} where it has none. Failures count as
    empty answers."""
    if not isinstance(task, Measured) or not rollouts:
        return {}
    return task.metrics([(r.example, "" if r.failed else r.text) for r in rollouts])


def text_likelihood(
    model: str,
    dtype: str,
    device: str,
    adapter: str | None,
    text: str,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Likelihood:
    """Perplexity of a model, with the adapter of a directory or without, on a text.

    Raises:
        UserError: as `open_engine`, or the text is too short.
    """
    from loralab.engines.likelihood import likelihood
    from loralab.models.load import load

    state = None if adapter is None else AdapterState.load(Path(adapter))
    loaded, tokenizer = load(model, dtype, device)
    if state is not None:
        _check_fit(state, loaded, f"adapter {adapter!r} is not for model {model!r}")
    return likelihood(loaded, tokenizer, text, state, max_tokens=max_tokens, progress=progress)


def open_engine(
    model: str, dtype: str, device: str, adapter: str | None
) -> tuple[Engine, str | None]:
    """An engine over a model, with the adapter of a directory loaded, and that adapter's name.

    Raises:
        UserError: there is no such model or adapter, or the adapter belongs to another model.
    """
    from loralab.engines.batched import BatchedEngine
    from loralab.models.load import load

    state = None if adapter is None else AdapterState.load(Path(adapter))
    loaded, tokenizer = load(model, dtype, device)
    if state is not None:
        _check_fit(state, loaded, f"adapter {adapter!r} is not for model {model!r}")
    engine = BatchedEngine(loaded, tokenizer)
    if state is None or adapter is None:
        return engine, None
    engine.load({adapter: state})
    return engine, adapter


def _check_fit(state: AdapterState, model: Any, complaint: str) -> None:
    try:
        weights = linear_weights(model, sorted(state.factors))
    except UserError as error:
        raise UserError(f"{complaint}: {error}") from error
    for module, (a, b) in state.factors.items():
        given, needed = (b.shape[0], a.shape[1]), tuple(weights[module].shape)
        if given != needed:
            raise UserError(f"{complaint}: {module} is {needed}, the adapter's {given}")
