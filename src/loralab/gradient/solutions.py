"""Solutions sampled from a generator and labelled by their task, kept in the run's directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loralab import ranks
from loralab.adapters.state import AdapterState
from loralab.config import GenerationConfig
from loralab.config.verifier import VerifierConfig
from loralab.engines.base import Progress
from loralab.engines.batched import BatchedEngine
from loralab.engines.prompts import PromptEncoder
from loralab.errors import UserError
from loralab.gradient.rows import IGNORED, Row
from loralab.gradient.verifier import Solution
from loralab.rollouts import Batch
from loralab.run import Run
from loralab.tasks.base import Example, Split, Task

_GENERATOR = "generator"


class Sampler:
    """Made over the base model, before anything is attached to it."""

    def __init__(self, model: Any, tokenizer: Any, task: Task, config: VerifierConfig) -> None:
        self._engine = BatchedEngine(model, tokenizer, threads=config.threads)
        self._encoder = PromptEncoder(tokenizer)
        self._task = task
        self._config = config
        self._name: str | None = None
        if config.solutions.generator is not None:
            self._engine.load({_GENERATOR: _read(Path(config.solutions.generator))})
            self._name = _GENERATOR

    @property
    def kernel(self) -> str:
        return self._engine.kernel

    def solutions(
        self, split: Split, examples: Sequence[Example], samples: int, progress: Progress
    ) -> list[list[Solution]]:
        """Solutions of each example, those that could be made, however long.

        Raises:
            UserError: none could.
        """
        config = self._config
        settings: GenerationConfig = config.generation.model_copy(
            update={"temperature": config.solutions.temperature}
        )
        batches = [
            Batch(self._task, split, tuple(examples), settings, f"{config.seed}|solutions|{sample}")
            for sample in range(samples)
        ]
        requests = [request for batch in batches for request in batch.requests(self._name)]
        answers = self._engine.generate(requests, progress)
        groups: list[list[Solution]] = [[] for _ in examples]
        for number, batch in enumerate(batches):
            given = answers[number * len(examples) : (number + 1) * len(examples)]
            for place, (rollout, answer) in enumerate(zip(batch.judge(given), given, strict=True)):
                prompt = tuple(self._encoder.encode(rollout.prompt))
                row = Row(prompt + answer.tokens, (IGNORED,) * len(prompt) + answer.tokens)
                if answer.finish_reason != "error" and row.learned:
                    says = answer_of(self._task, rollout.example, rollout.text)
                    right = bool(rollout.score.correct)
                    groups[place].append(Solution(rollout.example.id, row, right, says))
        if not any(groups):
            why = next((a.error for a in answers if a.error), "they are all empty")
            raise UserError(f"no solution could be sampled: {why}")
        return [group for group in groups if group]


def fitting(groups: Sequence[Sequence[Solution]], max_length: int) -> tuple[list[Solution], int]:
    """The solutions that training.max_length has room for, and how many are longer.

    Raises:
        UserError: all are.
    """
    every = [one for group in groups for one in group]
    kept = [one for one in every if len(one.row.input_ids) <= max_length]
    if not kept:
        raise UserError(
            f"all {len(every)} sampled solutions are longer than training.max_length {max_length}; "
            "raise it, or lower generation.max_new_tokens, in another --run-dir"
        )
    return kept, len(every) - len(kept)


def answer_of(task: Task, example: Example, text: str) -> str | None:
    """What a completion answers, to count votes by: as the task reads it, else its whole text."""
    read: Callable[[Example, str], str | None] | None = getattr(task, "answer", None)
    return (text.strip() or None) if read is None else read(example, text)


def stored(run: Run, name: str, make: Callable[[], list[list[Solution]]]) -> list[list[Solution]]:
    """The solutions in a file of the run, made and written there if it is not; processes beside
    the one that leads wait for it."""
    path = run.path / name
    if run.leads and not path.exists():
        groups = make()
        run.write(name, "".join(json.dumps(_record(one)) + "\n" for g in groups for one in g))
    ranks.wait()
    groups = []
    for line in path.read_text(encoding="utf-8").splitlines():
        one = _solution(json.loads(line))
        if not groups or groups[-1][0].example != one.example:
            groups.append([])
        groups[-1].append(one)
    return groups


def _record(one: Solution) -> dict[str, Any]:
    tokens = [label for label in one.row.labels if label != IGNORED]
    prompt = list(one.row.input_ids[: len(one.row.input_ids) - len(tokens)])
    return {
        "example": one.example,
        "right": one.right,
        "answer": one.answer,
        "prompt": prompt,
        "tokens": tokens,
    }


def _solution(record: dict[str, Any]) -> Solution:
    prompt, tokens = tuple(record["prompt"]), tuple(record["tokens"])
    row = Row(prompt + tokens, (IGNORED,) * len(prompt) + tokens)
    return Solution(record["example"], row, record["right"], record["answer"])


def _read(directory: Path) -> AdapterState:
    try:
        return AdapterState.load(directory)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"solutions.generator {str(directory)!r}: no adapter that can be read: {error}"
        ) from error
