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
from typing import TYPE_CHECKING, Any, NoReturn

from loralab import __version__, data_cli, doctor_cli, eval_cli, ranks
from loralab.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from loralab.tasks.base import Split

STOPPED = 130
_MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT}
_BENCHES = (
    *("population", "inits", "adapters", "sinks", "baselines", "sft", "dpo", "pretrain"),
    *("faults", "collapse"),
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

    demo = add("demo", _demo, "evolve a packaged model to be concise, on the CPU, in minutes")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="change the demo's config")
    demo.add_argument("--run-dir", metavar="DIR", help="default runs/demo-DATE-TIME")

    run = add("run", _run, "run a config to a finished run directory with its report")
    run.add_argument("config", nargs="?", help="a YAML file, or the name of a shipped config")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="as in adapter.rank=16")
    run.add_argument(
        "--run-dir", metavar="DIR", help="default runs/NAME-DATE-TIME, of a pipeline runs/NAME"
    )
    run.add_argument("--resume", action="store_true", help="continue the run in --run-dir")
    run.add_argument("--dry-run", action="store_true", help="check and print the config, and stop")

    replay = add("replay", _replay, "rebuild the adapter of any generation from a run's journal")
    replay.add_argument("run", metavar="RUN")
    replay.add_argument(
        "--generation", type=_natural, metavar="N", help="0 the start; default last"
    )
    replay.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")

    export = add("export", _export, "an adapter in another program's format, and what that loses")
    export.add_argument(
        "adapter", metavar="ADAPTER", help="PEFT, mlx-lm, .gguf, a tuned model or (llama) a decoder"
    )
    export.add_argument("--to", required=True, choices=("peft", "mlx", "gguf", "merged", "llama"))
    export.add_argument("--output", required=True, metavar="PATH", help="must not exist yet")
    export.add_argument("--base", metavar="MODEL", help="smollm2, a directory, .gguf or a hub name")
    export.add_argument("--rank", type=_natural, metavar="R", help="of an SVD, default 16")
    export.add_argument(
        "--approximate", action="store_true", help="a nonlinear adapter as the nearest plain LoRA"
    )
    export.add_argument(
        "--without-sinks", action="store_true", help="a decoder without its cache of fixed size"
    )

    report = add("report", _report, "write a run's report.html and figures anew")
    report.add_argument("run", metavar="RUN")

    generate = add("generate", _generate, "what a model answers")
    _model_arguments(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--plain", action="store_true", help="continue the text, without a chat")
    _sampling_arguments(generate)

    evaluate = add("eval", eval_cli.run, "a task's score of a model, every completion kept")
    _model_arguments(evaluate)
    _task_arguments(evaluate, "test")
    _sampling_arguments(evaluate)
    eval_cli.add(evaluate, _task_options)

    doctor = add("doctor", doctor_cli.run, "is an adapter broken, why, and what to do about it")
    doctor_cli.add(doctor, _natural)

    weights = add("weights", _weights, "magnitudes of a model's weights, outliers, noise scales")
    _model_arguments(weights, adapter=False)
    weights.add_argument("--fraction", type=float, default=0.1, help="of the mean |W|; default 0.1")
    weights.add_argument("--modules", action="store_true", help="every module, not only layers")
    weights.add_argument("--json", action="store_true")

    inits = add("inits", _inits, "the initialisations there are: formula, source, cost, needs")
    inits.add_argument("--json", action="store_true")

    probes = add("probes", _probes, "what can be measured of a model's health, and what that costs")
    probes.add_argument("--json", action="store_true")

    tasks = add("tasks", _tasks, "the tasks there are; `tasks check NAME` proves one's grader")
    below = tasks.add_subparsers(metavar="check")
    check = below.add_parser("check", help="gold answers must score full marks, others less")
    check.set_defaults(command=_check)
    check.add_argument("name", metavar="NAME")
    _task_arguments(check, None)

    data = add("data", None, "convert, merge, dedup, split, check and lint training files")
    data_cli.add(data, _options)

    bench = add("bench", _bench, f"side-by-side measurements: {', '.join(_BENCHES)}")
    bench.add_argument("name", choices=_BENCHES)
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own options")
    return parser


def _model_arguments(parser: argparse.ArgumentParser, adapter: bool = True) -> None:
    run = ", or a run's directory" if adapter else ""
    parser.add_argument(
        "model", metavar="MODEL", help=f"smollm2, a directory, .gguf or a hub name{run}"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default bfloat16, or a run's own"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    if adapter:
        parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format")


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-new-tokens", type=_natural, default=256, metavar="N", help="default 256")
    add("--temperature", type=float, default=0.0, help="default 0: the likeliest token")
    add("--seed", type=_natural, default=0, help="of sampling, default 0")


def _task_arguments(parser: argparse.ArgumentParser, split: str | None) -> None:
    choice = "both" if split is None else split
    parser.add_argument(
        "--split", choices=("train", "test"), default=split, help=f"default {choice}"
    )
    parser.add_argument(
        "--limit", type=_natural, metavar="N", help="only the first N examples (of a text: tokens)"
    )
    parser.add_argument(
        "--unsafe-exec", action="store_true", help="run generated code where nothing isolates it"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="key=value", help="of the task; repeatable"
    )


def _demo(arguments: argparse.Namespace) -> int:
    from loralab.demo import demo

    complete = demo(arguments.overrides, arguments.run_dir, _console())
    return 0 if complete else STOPPED


def _run(arguments: argparse.Namespace) -> int:
    from loralab import config as configs

    name, overrides, run_dir = arguments.config, arguments.overrides, arguments.run_dir
    if name is not None and "=" in name and not Path(name).exists():
        name, overrides = None, [name, *overrides]
    if name is None and not arguments.resume:
        raise UserError(f"run needs a CONFIG: a YAML file or one of {', '.join(configs.shipped())}")
    if name is None and overrides:
        raise UserError(f"override {overrides[0]!r}: a resumed run keeps the config it began with")
    config = None if name is None else configs.load(name, overrides)
    if arguments.resume and run_dir is None and not isinstance(config, configs.PipelineConfig):
        raise UserError("--resume needs --run-dir DIR, the run to continue")
    if arguments.dry_run:
        return _dry_run(config, run_dir)

    from loralab import pipeline
    from loralab.demo import say_end
    from loralab.display import Display

    console = _console()
    with Display(console) as display:
        if config is None:
            run, result = pipeline.resume(Path(run_dir), None, display)
        else:
            directory = Path(run_dir) if run_dir else pipeline.directory_of(config)
            if arguments.resume:
                run, result = pipeline.resume(directory, config, display)
            else:
                run, result = pipeline.start(config, directory, display)
    if run.leads:
        say_end(run, result.complete, console)
    return 0 if result.complete else STOPPED


def _dry_run(config: Any, run_dir: str | None) -> int:
    import yaml

    from loralab import config as configs
    from loralab.planning import plan
    from loralab.run import Run

    if config is None:
        config = configs.parse(Run.open(str(run_dir)).config, f"{run_dir}/config.yaml")
    print(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), end="")
    for line in plan(config):
        print(line, file=sys.stderr)
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from loralab.evolution.replay import save_generation
    from loralab.run import Run

    made = save_generation(Run.open(arguments.run), arguments.generation, Path(arguments.out))
    print(f"generation {made.generation}, digest {made.digest}: {made.adapter}")
    if made.truncation is not None:
        print(f"the adapter is off by {made.truncation.total:.1%} of the change in the weights")
    return 0


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


def _report(arguments: argparse.Namespace) -> int:
    from loralab.report import build_report

    print(build_report(arguments.run))
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


def _inits(arguments: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from loralab.registry import INITS

    facts = {name: asdict(INITS.load(name).facts) for name in INITS.names()}
    if arguments.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for name, row in facts.items():
        quantized = "yes" if row["quantized"] else "no, refused before training"
        print(f"{name}\n    {row['formula']}\n    source: {row['source']}")
        print(f"    unchanged at step 0: {row['unchanged']}; on nf4 / int8: {quantized}")
        print(f"    cost: {row['cost']}; needs: {row['needs']}")
    return 0


def _probes(arguments: argparse.Namespace) -> int:
    import json

    from loralab.registry import PROBES

    found = {name: PROBES.load(name) for name in PROBES.names()}
    facts = {n: {"measures": probe.measures, "cost": probe.cost} for n, probe in found.items()}
    if arguments.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for name, row in facts.items():
        print(f"{name}\n    {row['measures']}\n    cost: {row['cost']}")
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    from loralab.registry import TASKS

    for name in TASKS.names():
        print(f"{name:<16} {TASKS.target(name)}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from loralab import tasks
    from loralab.tasks.check import check

    task = tasks.get(arguments.name, **_task_options(arguments))
    sound = True
    splits: Sequence[Split] = (arguments.split,) if arguments.split else ("train", "test")
    if arguments.split is None:  # a test set has no train split
        splits = [split for split in splits if task.examples(split)] or splits
    for split in splits:
        result = check(task, split, arguments.limit)
        verdict = "sound" if result.passed else "BROKEN"
        golds = result.examples - len(result.without_gold)
        print(f"{result.task}, {split}: {verdict}; {golds} gold answers of {result.examples}")
        for failure in result.failures[:20]:
            print(f"  {failure.example}: {failure.what}: {failure.reason}")
        sound = sound and result.passed
    return 0 if sound else 1


def _bench(arguments: argparse.Namespace) -> int:
    from importlib import import_module

    status: int = import_module(f"loralab.bench.{arguments.name}").main(arguments.rest)
    return status


def _task_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = _options(arguments.option)
    return {**options, "unsafe_exec": True} if arguments.unsafe_exec else options


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    from loralab.yaml import parse_yaml

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--option {pair!r}: expected key=value, as in seed=3")
        options[key] = parse_yaml(value, f"--option {pair!r}")
    return options


def _natural(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _console() -> Console:
    from rich.console import Console

    # Of several processes that train one model, the first tells how it goes.
    return Console(stderr=True, quiet=ranks.rank() > 0)


def _fail(message: str) -> int:
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    who = f" process {ranks.rank()}:" if ranks.rank() else ""
    print(f"loralab:{who} {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
