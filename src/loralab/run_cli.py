"""`loralab run` and `demo`, and what is made of a run afterwards: `replay` and `report`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab import ranks
from loralab.errors import UserError
from loralab.interrupt import Interrupt

if TYPE_CHECKING:
    from rich.console import Console

STOPPED = 130
"""Exit code of what the user stopped."""


def _exit_code(complete: bool) -> int:
    """A run that SIGTERM asked to stop, and that stopped in order, did what its machine asked: it
    ends well. One that a user interrupts is a command that did not come to its end."""
    return 0 if complete or Interrupt.asked_by is signal.SIGTERM else STOPPED


def demo(arguments: argparse.Namespace) -> int:
    """Evolve the packaged model."""
    from loralab.demo import demo

    return _exit_code(demo(arguments.overrides, arguments.run_dir, _console()))


def run(arguments: argparse.Namespace) -> int:
    """Begin a run or go on with one; or, with --dry-run, say what it would be."""
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
    return _exit_code(result.complete)


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


def replay(arguments: argparse.Namespace) -> int:
    """Write the adapter of a generation."""
    from loralab.evolution.replay import save_generation
    from loralab.run import Run

    made = save_generation(Run.open(arguments.run), arguments.generation, Path(arguments.out))
    print(f"generation {made.generation}, digest {made.digest}: {made.adapter}")
    if made.truncation is not None:
        print(f"the adapter is off by {made.truncation.total:.1%} of the change in the weights")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Write a run's page anew."""
    from loralab.report import build_report

    print(build_report(arguments.run))
    return 0


def _console() -> Console:
    from rich.console import Console

    # Of several processes that train one model, the first tells how it goes.
    return Console(stderr=True, quiet=ranks.rank() > 0)
