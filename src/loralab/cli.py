"""The command line. Thin: each command imports what it needs when it runs.

Exit codes: 0 done, 1 a check failed, 2 something the user can mend (one line says what), 130
stopped by the user.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from loralab import __version__, catalogue_cli, data_cli, doctor_cli, eval_cli, ranks, run_cli
from loralab.arguments import (
    model_arguments,
    natural,
    options,
    sampling_arguments,
    task_arguments,
    task_options,
)
from loralab.errors import UserError
from loralab.run_cli import STOPPED

_MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT}
_BENCHES = (
    *("population", "inits", "adapters", "sinks", "baselines", "sft", "dpo", "pretrain"),
    *("faults", "collapse", "resilience"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. Errors that a user can mend become one line, no traceback."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("loralab: interrupted", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        # Whoever read our output has enough of it; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}; nothing that was written before is lost")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments, `command` among them. key=value overrides may stand before or after options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides: list[str] | None = getattr(arguments, "overrides", None)
    for word in rest:
        if overrides is None or word.startswith("-") or "=" not in word:
            parser.error(f"unrecognized argument {word!r}")
        overrides.append(word)
    return arguments


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; `--help` has the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="loralab", description=sys.modules["loralab"].__doc__)
    parser.add_argument("--version", action="version", version=f"loralab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=command)
        return made

    demo = add(
        "demo", run_cli.demo, "evolve a packaged model to be concise, on the CPU, in minutes"
    )
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="change the demo's config")
    demo.add_argument("--run-dir", metavar="DIR", help="default runs/demo-DATE-TIME")

    run = add("run", run_cli.run, "run a config to a finished run directory with its report")
    run.add_argument("config", nargs="?", help="a YAML file, or the name of a shipped config")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="as in adapter.rank=16")
    run.add_argument(
        "--run-dir", metavar="DIR", help="default runs/NAME-DATE-TIME, of a pipeline runs/NAME"
    )
    run.add_argument("--resume", action="store_true", help="continue the run in --run-dir")
    run.add_argument("--dry-run", action="store_true", help="check and print the config, and stop")

    about_replay = "rebuild the adapter of any generation from a run's journal"
    replay = add("replay", run_cli.replay, about_replay)
    replay.add_argument("run", metavar="RUN")
    replay.add_argument("--generation", type=natural, metavar="N", help="0 the start; default last")
    replay.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")

    export = add("export", _export, "an adapter in another program's format, and what that loses")
    export.add_argument(
        "adapter", metavar="ADAPTER", help="PEFT, mlx-lm, .gguf, a tuned model or (llama) a decoder"
    )
    export.add_argument("--to", required=True, choices=("peft", "mlx", "gguf", "merged", "llama"))
    export.add_argument("--output", required=True, metavar="PATH", help="must not exist yet")
    export.add_argument("--base", metavar="MODEL", help="smollm2, a directory, .gguf or a hub name")
    export.add_argument("--rank", type=natural, metavar="R", help="of an SVD, default 16")
    export.add_argument(
        "--approximate", action="store_true", help="a nonlinear adapter as the nearest plain LoRA"
    )
    export.add_argument(
        "--without-sinks", action="store_true", help="a decoder without its cache of fixed size"
    )

    report = add("report", run_cli.report, "write a run's report.html and figures anew")
    report.add_argument("run", metavar="RUN")

    generate = add("generate", _generate, "what a model answers")
    model_arguments(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--plain", action="store_true", help="continue the text, without a chat")
    sampling_arguments(generate)

    evaluate = add("eval", eval_cli.run, "a task's score of a model, every completion kept")
    model_arguments(evaluate)
    task_arguments(evaluate, "test")
    sampling_arguments(evaluate)
    eval_cli.add(evaluate, task_options)

    doctor = add("doctor", doctor_cli.run, "is an adapter broken, why, and what to do about it")
    doctor_cli.add(doctor, natural)

    weights = add("weights", _weights, "magnitudes of a model's weights, outliers, noise scales")
    model_arguments(weights, adapter=False)
    weights.add_argument("--fraction", type=float, default=0.1, help="of the mean |W|; default 0.1")
    weights.add_argument("--modules", action="store_true", help="every module, not only layers")
    weights.add_argument("--json", action="store_true")

    about_inits = "the initialisations there are: formula, source, cost, needs"
    inits = add("inits", catalogue_cli.inits, about_inits)
    inits.add_argument("--json", action="store_true")

    about_probes = "what can be measured of a model's health, and what that costs"
    probes = add("probes", catalogue_cli.probes, about_probes)
    probes.add_argument("--json", action="store_true")

    about_tasks = "the tasks there are; `tasks check NAME` proves one's grader"
    tasks = add("tasks", catalogue_cli.tasks, about_tasks)
    below = tasks.add_subparsers(metavar="check")
    check = below.add_parser("check", help="gold answers must score full marks, others less")
    check.set_defaults(command=catalogue_cli.check)
    check.add_argument("name", metavar="NAME")
    task_arguments(check, None)

    data = add("data", None, "convert, merge, dedup, split, check and lint training files")
    data_cli.add(data, options)

    bench = add("bench", _bench, f"side-by-side measurements: {', '.join(_BENCHES)}")
    bench.add_argument("name", choices=_BENCHES)
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own options")
    return parser


def _export(arguments: argparse.Namespace) -> int:
    from loralab.export import export

    made = export(
        Path(arguments.adapter),
        arguments.to,
        Path(arguments.output),
        arguments.base,
        arguments.rank,
        arguments.approximate,
        arguments.without_sinks,
    )
    print("\n".join(made.lines))
    if arguments.to != "gguf" and any(line.startswith("approximated") for line in made.lines):
        from loralab import examine

        print(examine.doctor(arguments.output, arguments.base))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from loralab.engines.base import Request, Sampling
    from loralab.evaluate import open_engine
    from loralab.report.text import visible
    from loralab.tasks.base import Message

    text = arguments.prompt
    prompt = text if arguments.plain else [Message(role="user", content=text)]
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    engine, adapter = open_engine(
        arguments.model, arguments.dtype, arguments.device, arguments.adapter
    )
    [completion] = engine.generate([Request(prompt, adapter, sampling)])
    if completion.error is not None:
        raise UserError(completion.error)
    # A terminal must not be steered by what a model writes; a file gets it as it is.
    shown = visible(completion.text, longest=10**9) if sys.stdout.isatty() else completion.text
    print(shown)
    return 0


def _weights(arguments: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from loralab.adapters.scale import analyse
    from loralab.adapters.targets import linear_weights
    from loralab.models.load import load

    model, _ = load(arguments.model, arguments.dtype or "bfloat16", arguments.device)
    report = analyse(linear_weights(model))
    noise = report.perturbation("module", "mean", arguments.fraction)
    if arguments.json:
        print(json.dumps({**report.to_dict(), "noise": noise}))
        return 0
    shown = report.modules if arguments.modules else report.layers
    print(f"{'mean |W|':>10} {'median':>10} {'RMS':>10} {'max':>10} {'noise':>10}")
    for name, row in shown.items():
        facts = asdict(row)
        numbers = [facts[key] for key in ("mean", "median", "rms", "max")]
        numbers.append(arguments.fraction * row.mean)
        print(" ".join(f"{value:>10.4g}" for value in numbers), name)
    print(f"noise: RMS of the change of W, {arguments.fraction:g} x mean |W|")
    for outlier in report.outliers:
        print(f"outlier: {outlier}")
    if not report.outliers:
        print("no module is out of proportion")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from importlib import import_module

    status: int = import_module(f"loralab.bench.{arguments.name}").main(arguments.rest)
    return status


def _fail(message: str) -> int:
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    who = f" process {ranks.rank()}:" if ranks.rank() else ""
    print(f"loralab:{who} {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
