"""From a config to a finished run directory with its report."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from loralab import config as configs
from loralab import ranks
from loralab.config import AnyConfig, PipelineConfig
from loralab.errors import UserError
from loralab.evolution.events import Event, Notice
from loralab.evolution.start import START
from loralab.interrupt import Interrupt
from loralab.report import build_report
from loralab.report.stages import TABLE
from loralab.run import Run

if TYPE_CHECKING:
    from loralab.gradient.events import TrainingEvent

    OnEvent = Callable[[Event | TrainingEvent], None]


TRAINERS: Mapping[str, tuple[str, str | None]] = {
    "evolve": ("loralab.evolution.trainer:evolve", None),
    "sft": ("loralab.gradient.fine_tune:fine_tune", "step"),
    "pretrain": ("loralab.gradient.pretrain:pretrain", "step"),
    "dpo": ("loralab.gradient.align:align", "step"),
    "grpo": ("loralab.gradient.reinforce:reinforce", "step"),
    "verifier": ("loralab.gradient.verify:verify", "step"),
    "classify": ("loralab.gradient.classify:classify", "step"),
    "seq2seq": ("loralab.gradient.seq2seq:seq2seq", "step"),
    "distill": ("loralab.gradient.distill:distill", "step"),
    "ablation": ("loralab.gradient.ablation:ablate", "run"),
    "eval": ("loralab.measure:measure", "measurement"),
    "pipeline": ("loralab.stages.runner:run_stages", "stage"),
}
"""What runs a kind of config, imported when it does, and what a signal waits for the end of."""
TOGETHER = ("sft", "pretrain", "dpo", "verifier", "classify", "seq2seq")
"""Kinds that several processes can train together, as `accelerate launch` starts them."""
_BEGINNING = {"config.yaml", "environment.json", "timings.json", ".lock", START}


class Result(Protocol):
    """What every kind of run comes back with."""

    @property
    def complete(self) -> bool:
        """False if it stopped at a signal and can be resumed."""
        ...


def default_directory(name: str) -> Path:
    """runs/NAME-DATE-TIME, with a number behind it if there is one already."""
    wanted = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = wanted, 2
    while path.exists():
        path, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return path


def directory_of(config: AnyConfig) -> Path:
    """Where a config runs if no one says: a pipeline always in the same place, to go on there."""
    if isinstance(config, PipelineConfig):
        return Path("runs") / config.name
    return default_directory(config.name)


def start(config: AnyConfig, directory: Path, on_event: OnEvent) -> tuple[Run, Result]:
    """Run a config in a new directory, to the report; a pipeline also where it was begun before.

    Raises:
        UserError: something the user can mend. If the run never began, the directory is
            removed again, so that the mended command can be repeated as it is; whatever it made
            before is kept, with its config, for --resume.
    """
    if isinstance(config, PipelineConfig) and (directory / "config.yaml").exists():
        return resume(directory, config, on_event)
    existed = directory.exists()
    _join(config, on_event)
    run = _led(lambda: Run.create(directory, config.to_dict()))
    try:
        return run, _finish(config, run, on_event)
    except UserError:
        if run.leads:
            _discard(run, existed)
        raise
    finally:
        run.close()


def resume(directory: Path, config: AnyConfig | None, on_event: OnEvent) -> tuple[Run, Result]:
    """Continue the run in a directory. A config, if given, has to equal the one it started with,
    but for a pipeline's: stages that it changes are run anew beside the old ones.

    Raises:
        UserError: there is no such run, its config differs, or something the user can mend.
    """
    changing = isinstance(config, PipelineConfig)
    values = None if config is None else config.to_dict()
    if ranks.world() > 1:
        stored = configs.parse(Run.open(directory).config, str(directory / "config.yaml"))
        _join(stored, on_event)
    with _led(lambda: Run.resume(directory, None if changing else values)) as run:
        if changing and values is not None:
            _renew(run, values)
        stored = configs.parse(run.config, str(directory / "config.yaml"))
        return run, _finish(stored, run, on_event)


def _renew(run: Run, values: dict[str, Any]) -> None:
    """Give a pipeline's run another config; the one before and its table are kept, numbered."""
    if values == run.config:
        return
    if run.config.get("kind") != "pipeline":
        raise UserError(
            f"{run.path} holds a run of kind {run.config.get('kind')!r}, no pipeline: choose "
            "another --run-dir"
        )
    number = 1
    while (run.path / f"config-{number}.yaml").exists():
        number += 1
    for file in (run.path / "config.yaml", *run.path.glob(f"{TABLE}.*")):
        run.write(f"{file.stem}-{number}{file.suffix}", file.read_bytes())
    run.write("config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    run.config = values


def _join(config: AnyConfig, on_event: OnEvent) -> None:
    """Meet the processes that were launched beside this one, if there are any."""
    world = ranks.world()
    if world == 1:
        if ranks.left_alone():
            on_event(Notice("accelerate launch started one process; more need --multi_gpu"))
        return
    if config.kind not in TOGETHER:
        raise UserError(
            f"kind: {config.kind} runs in one process, not in {world}: start it without accelerate "
            f"launch (several processes train {', '.join(TOGETHER)})"
        )
    if wanted := ranks.sharding():
        raise UserError(
            f"{wanted} gives each process a part of the weights, and process 0 evaluates and saves "
            "with the whole: launch with --multi_gpu instead, or see docs/distributed.md"
        )
    from loralab.models.load import pick_device

    ranks.join(on_cpu=pick_device(config.device).type == "cpu")


def _led(open_run: Callable[[], Run]) -> Run:
    """The run as this process opens it, or beside process 0, which tells where it is."""
    if ranks.rank():
        path = ranks.told()
        if not path:
            raise UserError("process 0 could not open the run")
        return Run.beside(path)
    try:
        run = open_run()
    except BaseException:
        ranks.tell("")
        raise
    ranks.tell(str(run.path.resolve()))
    return run


def _finish(config: AnyConfig, run: Run, on_event: OnEvent) -> Result:
    target, unit = TRAINERS[config.kind]
    module, _, name = target.partition(":")
    if not run.leads:
        on_event = _silent
    train: Callable[..., Result] = getattr(import_module(module), name)
    # Evolution watches for signals itself: it has generations in flight to tell of.
    result = _watched(train, unit, config, run, on_event) if unit else train(config, run, on_event)
    if run.leads:
        build_report(run.path)
    # A launcher ends all processes when one has ended unfinished: the report comes first.
    ranks.wait()
    ranks.leave()
    return result


def _watched(
    train: Callable[..., Result], unit: str, config: AnyConfig, run: Run, on_event: OnEvent
) -> Result:
    """Train until it is done or a signal comes; what went wrong with numbers is on the page too."""
    from loralab.gradient.loop import NonFiniteError

    def said(name: str) -> None:
        on_event(Notice(f"{name}: stopping after the {unit} in flight; again to stop at once"))

    with Interrupt(said) as interrupt:
        try:
            return train(config, run, on_event, lambda: interrupt.requested)
        except NonFiniteError:
            if run.leads:
                build_report(run.path)
            ranks.wait()
            raise


def _silent(event: Event | TrainingEvent) -> None:
    """Process 0 tells how it goes."""


def _discard(run: Run, existed: bool) -> None:
    """Take away a run that never began: it made nothing but what every run begins with."""
    files = (path.relative_to(run.path) for path in run.path.rglob("*") if not path.is_dir())
    if not {file.parts[0] for file in files} <= _BEGINNING:
        return
    run.close()
    with contextlib.suppress(OSError):
        for entry in run.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    if not existed:
        with contextlib.suppress(OSError):
            run.path.rmdir()
