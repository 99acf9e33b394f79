"""`loralab eval`: a task's score of a model, every completion of it written down."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab.errors import UserError

if TYPE_CHECKING:
    from loralab.engines.base import Engine
    from loralab.evaluate import Evaluation
    from loralab.subject import Subject
    from loralab.tasks.metrics import Estimate

Options = Callable[[argparse.Namespace], dict[str, Any]]

_OF_ANSWERS = ("samples", "k", "shots", "stop", "max_new_tokens", "temperature", "seed")
"""Options about completions, of which a text's perplexity has none."""


def add(parser: argparse.ArgumentParser, task_options: Options) -> None:
    """Arguments of the command beside the model's, the task's and sampling's, which are there.

    task_options: options of the task from the parsed arguments.
    """
    add = parser.add_argument
    add("--task", required=True, metavar="NAME")
    add("--samples", type=int, default=1, metavar="N", help="completions of each example")
    add("--k", type=_numbers, metavar="K,K", help="pass@k of these; default 1 and N, if N > 1")
    add("--shots", type=_numbers, metavar="N,N", help="solved examples in the prompt; one by one")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable")
    add("--endpoint", metavar="URL", help="an OpenAI-compatible server, MODEL its name there")
    add("--key-variable", metavar="NAME", help="environment variable with the server's key")
    add("--out", metavar="DIR", help="what is written, default runs/eval-TASK-DATE-TIME")
    add("--json", action="store_true", help="everything, completions included; a line per --shots")
    unsaid = {name: parser.get_default(name) for name in _OF_ANSWERS}
    parser.set_defaults(task_options=task_options, unsaid=unsaid)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate once for each number of shots; write, and print a table or JSON."""
    from loralab import tasks
    from loralab.config import GenerationConfig
    from loralab.engines.endpoint import EndpointEngine
    from loralab.evaluate import engine_of, evaluate_into, wanted
    from loralab.run import Run
    from loralab.subject import Subject, subject_of
    from loralab.tasks.base import Continuous

    options = arguments.task_options(arguments)
    shots: Sequence[int | None] = arguments.shots or [None]
    made = [
        (few, tasks.get(arguments.task, **options, **({} if few is None else {"shots": few})))
        for few in shots
    ]
    _refuse_of_a_server(arguments)
    subject = (
        subject_of(arguments.model, arguments.adapter, arguments.dtype, arguments.device)
        if arguments.endpoint is None
        else Subject(arguments.model)
    )
    directory = _directory(arguments.out, arguments.task)
    asked = _asked(arguments, options, subject)
    if isinstance(made[0][1], Continuous):
        _refuse_of_answers(arguments)
        if arguments.endpoint is not None:
            raise UserError(f"{arguments.task} is a text: a server tells no perplexity of it")
        return _perplexity(arguments, made[0][1], subject, directory, asked)
    settings = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        stop=tuple(arguments.stop),
    )
    samples = arguments.samples
    k = arguments.k or ([1, samples] if samples > 1 else [])
    asked |= {
        "shots": arguments.shots,
        "samples": samples,
        "k": k,
        "generation": settings.model_dump(mode="json"),
    }
    for _, task in made:
        wanted(task, settings, arguments.split, arguments.limit, samples, k)
    engine: Engine
    if arguments.endpoint is not None:
        key = arguments.key_variable
        engine = EndpointEngine(arguments.endpoint, arguments.model, key_variable=key)
        adapter = None
    else:
        engine, adapter = engine_of(subject)
    rows: list[list[str]] = []
    hopeless = False
    with Run.create(directory, asked) as written:
        for few, task in made:
            with _Counter() as counter:
                result = evaluate_into(
                    written, engine, task, settings, few, adapter=adapter, split=arguments.split,
                    limit=arguments.limit, seed=arguments.seed, progress=counter, samples=samples,
                    k=k,
                )  # fmt: skip
            if arguments.json:
                facts = {"model": arguments.model, "adapter": arguments.adapter, "shots": few}
                print(json.dumps({**facts, "out": str(directory), **result.to_dict()}))
            rows += _table_rows(few, result)
            if arguments.endpoint is not None:
                hopeless |= 0 < len(result.rollouts) == result.failed
    if not arguments.json:
        _print_table(["task", "shots", "metric", "n", "score", "95 %"], rows)
    _say_where(directory)
    if hopeless:
        print("the server answered nothing: the score says nothing of the model", file=sys.stderr)
    return 1 if hopeless else 0


def _perplexity(
    arguments: argparse.Namespace,
    task: Any,
    subject: Subject,
    directory: Path,
    asked: Mapping[str, Any],
) -> int:
    from loralab.evaluate import text_likelihood
    from loralab.report.text import number
    from loralab.run import Run

    text = task.whole(arguments.split)
    with _Counter() as counter:
        measured = text_likelihood(subject, text, arguments.limit, counter).to_dict()
    with Run.create(directory, asked) as written:
        written.log_metrics({"task": task.name, "split": arguments.split, **measured})
    if arguments.json:
        facts = {"model": arguments.model, "adapter": arguments.adapter, "task": task.name}
        print(json.dumps({**facts, "split": arguments.split, **measured}))
    else:
        named = ", ".join(f"{key} {number(value)}" for key, value in measured.items())
        print(f"{task.name}, {arguments.split}: {named}")
    _say_where(directory)
    return 0


def _refuse_of_answers(arguments: argparse.Namespace) -> None:
    for name in _OF_ANSWERS:
        if getattr(arguments, name) != arguments.unsaid[name]:
            raise UserError(
                f"--{name.replace('_', '-')} is about answers, and {arguments.task} is a text "
                "whose perplexity is taken: leave it out"
            )


def _refuse_of_a_server(arguments: argparse.Namespace) -> None:
    """A server's model is as the server loaded it."""
    if arguments.endpoint is None:
        if arguments.key_variable is not None:
            raise UserError("--key-variable is the key of a server: give its --endpoint")
        return
    for name, unsaid in (("adapter", None), ("dtype", None), ("device", "auto")):
        if getattr(arguments, name) != unsaid:
            raise UserError(f"--{name} with --endpoint: the server has its model; leave it out")


def _score_text(score: Estimate) -> str:
    """A score with its error, as "0.25 ± 0.04"."""
    from loralab.report.text import number

    error = "" if score.error is None else f" ± {number(score.error)}"
    return f"{number(score.value)}{error}"


def _table_rows(shots: int | None, result: Evaluation) -> list[list[str]]:
    count = str(result.examples) + (f" x {result.samples}" if result.samples > 1 else "")
    few = "-" if shots is None else str(shots)
    rows = [
        [result.task, few, name, count, _score_text(score), _interval(score)]
        for name, score in result.scores.items()
    ]
    if result.failed:
        rows.append([result.task, few, "failed", count, str(result.failed), ""])
    return rows


def _interval(score: Estimate) -> str:
    if score.low is None or score.high is None:
        return ""
    return f"{score.low:.3f} to {score.high:.3f}"


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def _asked(
    arguments: argparse.Namespace, options: Mapping[str, Any], subject: Subject
) -> dict[str, Any]:
    """What `config.yaml` says of any evaluation; of one by answers, how they are made too."""
    here = {
        "model": subject.model,
        "adapter": subject.adapter,
        "dtype": subject.dtype,
        "device": subject.device,
        "quantization": subject.quantization,
    }
    there = {"model": arguments.model, "endpoint": arguments.endpoint}
    return {
        "kind": "task-eval",
        "name": f"eval-{arguments.task}",
        **(here if arguments.endpoint is None else there),
        "seed": arguments.seed,
        "task": {"name": arguments.task, "options": dict(options)},
        "split": arguments.split,
        "limit": arguments.limit,
    }


def _directory(out: str | None, task: str) -> Path:
    from loralab.pipeline import default_directory

    if out is None:
        return default_directory(f"eval-{task}")
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out {out}: is there already; give a directory that is not")
    return path


def _say_where(directory: Path) -> None:
    print(f"completions, scores and errors: {directory}", file=sys.stderr)


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers, as in 1,5,10")
    return [int(part) for part in parts]


class _Counter:
    """How far it is, on one line of a terminal; nothing elsewhere."""

    def __enter__(self) -> _Counter:
        return self

    def __call__(self, done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{of}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
