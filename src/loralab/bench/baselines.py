"""`loralab bench baselines`: every task's zero- and few-shot score of a model.

A line of the table is what one `loralab eval` measures, and has its run directory, so that what is
done is not done again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from loralab import tasks
from loralab.bench import command
from loralab.bench.command import told
from loralab.bench.table import Cell, Section, Table
from loralab.bench.timing import versions
from loralab.config import GenerationConfig
from loralab.engines.base import Engine
from loralab.errors import UserError
from loralab.evaluate import engine_of, evaluate_into, text_likelihood
from loralab.run import Run
from loralab.subject import Subject, subject_of
from loralab.tasks.base import Continuous
from loralab.tasks.choice import NAMES
from loralab.tasks.metrics import Estimate

PAGE = Path("docs/bench-baselines.md")
RUNS = Path("runs/baselines")
_TEXT_TOKENS = 20_000
_PACKAGES = ("loralab", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Line:
    """A task to measure with each number of shots; None where it takes none.

    folder: of the task's files under the data folder, "" for a task that needs none. limit: of
    examples, the first ones. tokens: the most of an answer. samples: completions of each example,
    at temperature 0.8 where there are several. shown: the numbers of the table.
    """

    task: str
    folder: str
    shots: tuple[int | None, ...]
    limit: int
    tokens: int
    shown: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1


def lines() -> list[Line]:
    """Every task; the eight commonsense sets are a line each."""
    correct = ("correct",)
    return [
        Line("gsm8k", "gsm8k", (0, 5), 100, 200, correct),
        Line("countdown", "", (0, 3), 100, 160, correct, {"examples": 500}),
        Line("conciseness", "", (0, 2), 8, 64, ("reward", "correct")),
        Line("humaneval", "humaneval", (None,), 164, 200, correct),
        Line("humaneval", "humaneval", (None,), 164, 200, correct, {"style": "chat"}),
        Line("humaneval", "humaneval", (None,), 40, 200, ("pass@1", "pass@5"), samples=5),
        Line("mbpp", "mbpp", (0, 3), 100, 150, correct),
        Line("sst2", "sst2", (0, 8), 300, 16, ("accuracy", "f1")),
        Line("samsum", "samsum", (0, 2), 100, 60, ("rouge1", "rouge2", "rougeL")),
        *(
            Line("choice", "commonsense", (0, 3), 100, 16, correct, {"dataset": name})
            for name in NAMES
        ),
        Line("text", "wikitext-2", (None,), _TEXT_TOKENS, 0, ("perplexity",)),
    ]


@dataclass(frozen=True)
class Options:
    """data: a folder with a folder for each task's files. limit: examples of each line at most.
    only: names of tasks, all without any. runs: where completions and scores go."""

    data: Path
    model: str = "smollm2"
    device: str = "auto"
    limit: int | None = None
    only: tuple[str, ...] = ()
    runs: Path = RUNS


@dataclass(frozen=True)
class Scored:
    """A measured line. scores: by name. seconds: what it took. facts: where, with which versions
    and when it was measured, as `command.facts` words them."""

    examples: int
    samples: int
    scores: Mapping[str, Estimate]
    seconds: float
    facts: Mapping[str, str]


def run(options: Options) -> Table:
    """Measure what the run directories do not hold yet; the table.

    Raises:
        UserError: a task's files are not there, or an unknown task or model.
    """
    command.check_counts(options)
    unknown = sorted(set(options.only) - {line.task for line in lines()})
    if unknown:
        known = ", ".join(dict.fromkeys(line.task for line in lines()))
        raise UserError(f"--only {unknown[0]}: expected some of {known}")
    chosen = [line for line in lines() if not options.only or line.task in options.only]
    if options.limit is not None:
        chosen = [replace(line, limit=min(line.limit, options.limit)) for line in chosen]
    bench = _Bench(options)
    rows: list[list[Cell]] = []
    data: list[dict[str, Any]] = []
    found: dict[str, dict[str, None]] = {}
    seconds = 0.0
    for line in chosen:
        for shots in line.shots:
            done = bench.measure(line, shots)
            seconds += done.seconds
            rows += _rows(line, shots, done, options)
            for name, value in done.facts.items():
                found.setdefault(name, {})[value] = None
            scores = {name: score.to_dict() for name, score in done.scores.items()}
            data.append(
                {
                    "task": _name(line),
                    "shots": shots,
                    "examples": done.examples,
                    "samples": done.samples,
                    "seconds": done.seconds,
                    "scores": scores,
                    "date": done.facts["date"],
                }
            )
    facts = {
        "model": told(options.model),
        **{name: "; ".join(values) for name, values in found.items()},
        "seconds": f"{seconds:.0f} for all lines",
    }
    columns = ["task", "shots", "metric", "n", "score ± s.e.", "command"]
    notes = [
        "n: examples, the first of the test split, x completions of each (of text: tokens). ± the "
        "standard error over examples; of F1 over resampled ones. Greedy, but for pass@k, at "
        "temperature 0.8. HumanEval is a test set without a train split, so it has no shots; "
        "perplexity has none either. DATA: what `--data` names."
    ]
    section = Section("Zero- and few-shot baselines", "", columns, rows, notes)
    return Table("Baselines", facts, [section], {"lines": data})


class _Bench:
    """Loads the model when the first line needs it."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._subject: Subject = subject_of(options.model, None, None, options.device)
        self._engine: Engine | None = None

    def measure(self, line: Line, shots: int | None) -> Scored:
        """The line's run, made if it is not there."""
        asked = self._asked(line, shots)
        # Of another model, data or version it is another run.
        digest = blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=4).hexdigest()
        path = self._options.runs / f"{asked['name']}-{digest}"
        if not (path / "config.yaml").exists():
            with Run.create(path, asked) as new:
                return self._fill(new, line, shots)
        with Run.resume(path, asked) as done:
            if kept := [row for row in done.metrics() if "scores" in row]:
                return _scored(done, kept[-1])
            done.write("completions.jsonl", "")
            return self._fill(done, line, shots)

    def _fill(self, run: Run, line: Line, shots: int | None) -> Scored:
        run.note(measured=command.facts(*_PACKAGES))
        task = tasks.get(line.task, **_task_options(line, shots, self._options.data))
        if isinstance(task, Continuous):
            began = time.perf_counter()
            found = text_likelihood(self._subject, task.whole("test"), line.limit)
            score = Estimate(found.perplexity, found.perplexity_error)
            row = {
                "examples": found.tokens,
                "samples": 1,
                "scores": {"perplexity": score.to_dict()},
                "seconds": time.perf_counter() - began,
            }
            run.log_metrics(row)
            return _scored(run, row)
        if self._engine is None:
            self._engine, _ = engine_of(self._subject)
        several = line.samples > 1
        evaluate_into(
            run,
            self._engine,
            task,
            GenerationConfig(max_new_tokens=line.tokens, temperature=0.8 if several else 0.0),
            shots,
            limit=line.limit,
            samples=line.samples,
            k=(1, line.samples) if several else (),
        )
        return _scored(run, run.metrics()[-1])

    def _asked(self, line: Line, shots: int | None) -> dict[str, Any]:
        few = "" if shots is None else f"-{shots}"
        many = f"-x{line.samples}" if line.samples > 1 else ""
        return {
            "kind": "task-eval",
            "name": f"{_name(line)}{few}{many}",
            "model": self._options.model,
            "task": {"name": line.task, "options": {**line.options, "shots": shots}},
            "limit": line.limit,
            "samples": line.samples,
            "max_new_tokens": line.tokens,
            "data": str(self._options.data.resolve()) if line.folder else None,
            "device": self._options.device,
            "versions": versions(*_PACKAGES),
        }


def _name(line: Line) -> str:
    told = (line.options[key] for key in ("dataset", "style") if key in line.options)
    return "-".join([line.task, *map(str, told)])


def _task_options(line: Line, shots: int | None, data: Path) -> dict[str, Any]:
    options = dict(line.options)
    if line.folder:
        options["path"] = str(data / line.folder)
    return options if shots is None else {**options, "shots": shots}


def _scored(run: Run, row: Mapping[str, Any]) -> Scored:
    scores = {name: Estimate(**score) for name, score in row["scores"].items()}
    facts = run.environment()["measured"]
    return Scored(row["examples"], row["samples"], scores, row["seconds"], facts)


def _rows(line: Line, shots: int | None, done: Scored, options: Options) -> Iterator[list[Cell]]:
    count = f"{done.examples:,}" + (f" x {done.samples}" if done.samples > 1 else "")
    few = "-" if shots is None else str(shots)
    command = f"`{_command(line, shots, options)}`"
    for name in line.shown:
        score = done.scores[name]
        yield [_name(line), few, name, count, _shown(score), command]
        command = "the same"


def _shown(score: Estimate) -> str:
    error = "" if score.error is None else f" ± {score.error:.2g}"
    return f"{score.value:.3g}{error}"


def _command(line: Line, shots: int | None, options: Options) -> str:
    words = ["loralab", "eval", told(options.model), "--task", line.task]
    for key, value in _task_options(line, None, Path("DATA")).items():
        words += ["--option", f"{key}={value}"]
    if shots is not None:
        words += ["--shots", str(shots)]
    words += ["--limit", str(line.limit)]
    if line.tokens:
        words += ["--max-new-tokens", str(line.tokens)]
    if line.samples > 1:
        words += ["--samples", str(line.samples), "--temperature", "0.8"]
    return shlex.join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loralab bench baselines", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a folder with gsm8k/, humaneval/ and so on in it")
    add("--model", help="default smollm2; a run's directory will do")
    add("--device", help="default auto")
    add("--limit", type=int, help="examples of each line, at most")
    add("--only", action="append", metavar="TASK", help="only this task; repeatable")
    add("--runs", type=Path, help=f"completions and scores, default {RUNS}")
    add("--out", type=Path, help=f"page to write, default {PAGE}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when measured, 2 for what the user can mend."""
    return command.main(_parser(), argv, PAGE, lambda given, _: run(Options(**given)))


if __name__ == "__main__":
    sys.exit(main())
