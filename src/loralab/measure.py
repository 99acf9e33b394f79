"""A run of `kind: eval`: perplexity on texts and scores on tasks, models side by side.

Each pair of model and measure adds a line to metrics.jsonl when it is done, and its completions
lie in `completions/MODEL/MEASURE.jsonl`; a killed run goes on with the first pair that is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from loralab import tasks
from loralab.config import EvalConfig, MeasureConfig
from loralab.engines.base import Engine
from loralab.engines.likelihood import Likelihood, likelihood
from loralab.errors import UserError
from loralab.evaluate import engine_over, evaluate
from loralab.gradient.corpus import read_corpus
from loralab.gradient.events import Answering, OnTrainingEvent, Remark, ignore
from loralab.interrupt import Ended
from loralab.run import Run
from loralab.subject import Subject
from loralab.tasks.base import Continuous
from loralab.timings import Timings


def measure(
    config: EvalConfig,
    run: Run,
    on_event: OnTrainingEvent = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> Ended:
    """Measure every model on everything that the run does not hold yet.

    Raises:
        UserError: something the user can mend; what was measured is kept.
    """
    done = {(row.get("model"), row.get("measure")) for row in run.metrics()}
    with Timings.of_run(run.timings_path) as timings:
        for name in config.models:
            missing = [m for m in config.measures if (name, m) not in done]
            if not missing:
                continue
            with timings.phase("server_launch"):
                subject = _Loaded(config, name)
            for wanted in missing:
                if stopping():
                    return Ended(False)
                with timings.phase("evaluation"):
                    row = subject.measure(wanted, run, on_event)
                run.log_metrics(
                    {"model": name, "measure": wanted, "parameters": subject.parameters, **row}
                )
                on_event(Remark(f"{name}: {wanted}: {said(row)}"))
    run.write("eval.json", json.dumps(run.metrics(), indent=2) + "\n")
    return Ended(True)


class _Loaded:
    """A model that is loaded, with its adapter beside it.

    parameters: of the model, and of the adapter.
    """

    def __init__(self, config: EvalConfig, name: str) -> None:
        import torch

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._config = config
        self._name = name
        own = config.models[name]
        self._opened = opened = Subject(
            config.model_of(name), own.adapter, config.dtype, config.device, own.quantization
        ).open()
        self.parameters = sum(map(_size, opened.model.parameters()))
        if opened.state is not None:
            self.parameters += sum(t.numel() for f in opened.state.factors.values() for t in f)
        self._engine: Engine | None = None
        self._adapter: str | None = None

    def measure(self, name: str, run: Run, on_event: OnTrainingEvent) -> dict[str, Any]:
        wanted = self._config.measures[name]

        def progress(done: int, of: int) -> None:
            on_event(Answering(done, of))

        if wanted.corpus is not None:
            return self._corpus(wanted)
        assert wanted.task is not None
        task = tasks.get(wanted.task.name, **wanted.task.options)
        if isinstance(task, Continuous):
            text = task.whole(wanted.split)
            return self._likelihood(text, max_tokens=wanted.limit, progress=progress).to_dict()
        if self._engine is None:
            self._engine, self._adapter = engine_over(
                self._opened, "measured", self._config.threads
            )
        result = evaluate(
            self._engine,
            task,
            wanted.generation,
            self._adapter,
            wanted.split,
            wanted.limit,
            self._config.seed,
            progress,
            wanted.samples,
            wanted.k,
        ).to_dict()
        lines = "".join(json.dumps(row) + "\n" for row in result.pop("completions"))
        run.write(f"completions/{self._name}/{name}.jsonl", lines)
        return result

    def _likelihood(self, text: str, **how: Any) -> Likelihood:
        opened = self._opened
        return likelihood(opened.model, opened.tokenizer, text, opened.state, **how)

    def _corpus(self, wanted: MeasureConfig) -> dict[str, Any]:
        """Perplexity over held-out documents, each of them read alone."""
        assert wanted.corpus is not None
        [source] = read_corpus([wanted.corpus])
        found = [self._likelihood(document.whole) for document in source.test[: wanted.limit]]
        if not found:
            raise UserError(f"{wanted.corpus.path}: holds out no document; set test_share")
        whole = Likelihood(
            sum(one.nats for one in found),
            sum(one.tokens for one in found),
            sum(one.words for one in found),
            sum(one.bytes for one in found),
        )
        return {**whole.to_dict(), "documents": len(found)}


def _size(parameter: Any) -> int:
    """Weights that a parameter stands for; one in 4 bits stores two of them in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def said(row: dict[str, Any]) -> str:
    """The numbers of a measurement in a few words."""
    if "perplexity" in row:
        return f"perplexity {row['perplexity']:.4g} over {row['tokens']:,} tokens"
    correct = "" if row.get("correct") is None else f", correct {row['correct']:.1%}"
    return f"reward {row['reward']:.4g}{correct} on {row['examples']} examples"


def numbers_in(directory: Path) -> int:
    """How many numbers the .safetensors files of a directory hold; no tensor is read."""
    count = 0
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no dict
                size = 1
                for length in tensors.get_slice(key).get_shape():
                    size *= length
                count += size
    return count
