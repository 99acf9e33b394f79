"""From a config to a finished run directory with its report."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from loralab import config as configs
from loralab.config import (
    AblationConfig,
    AnyConfig,
    ClassifyConfig,
    DistillConfig,
    DpoConfig,
    EvolveConfig,
    GrpoConfig,
    PretrainConfig,
    Seq2SeqConfig,
    SftConfig,
    VerifierConfig,
)
from loralab.errors import UserError
from loralab.evolution.events import Event, Notice
from loralab.evolution.start import START
from loralab.interrupt import Interrupt
from loralab.report import build_report
from loralab.run import Run

if TYPE_CHECKING:
    from loralab.gradient.events import TrainingEvent

    OnEvent = Callable[[Event | TrainingEvent], None]


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


def start(config: AnyConfig, directory: Path, on_event: OnEvent) -> tuple[Run, Result]:
    """Run a config in a new directory, to the report.

    Raises:
        UserError: something the user can mend. If the run never began, the directory is
            removed again, so that the mended command can be repeated as it is.
    """
    existed = directory.exists()
    run = Run.create(directory, config.to_dict())
    try:
        return run, _finish(config, run, on_event)
    except UserError:
        if not run.journal_path.exists() and not run.metrics():
            _discard(run, existed)
        raise
    finally:
        run.close()


def resume(directory: Path, config: AnyConfig | None, on_event: OnEvent) -> tuple[Run, Result]:
    """Continue the run in a directory. A config, if given, has to equal the one it started with.

    Raises:
        UserError: there is no such run, its config differs, or something the user can mend.
    """
    run = Run.resume(directory, None if config is None else config.to_dict())
    with run:
        stored = configs.parse(run.config, str(directory / "config.yaml"))
        return run, _finish(stored, run, on_event)


def _finish(config: AnyConfig, run: Run, on_event: OnEvent) -> Result:
    result: Result
    match config:
        case EvolveConfig():
            result = _evolve(config, run, on_event)
        case SftConfig():
            result = _fine_tune(config, run, on_event)
        case PretrainConfig():
            result = _pretrain(config, run, on_event)
        case DpoConfig():
            result = _align(config, run, on_event)
        case GrpoConfig():
            result = _reinforce(config, run, on_event)
        case VerifierConfig():
            result = _verify(config, run, on_event)
        case ClassifyConfig():
            result = _classify(config, run, on_event)
        case Seq2SeqConfig():
            result = _seq2seq(config, run, on_event)
        case DistillConfig():
            return _distill(config, run, on_event)
        case AblationConfig():
            return _ablate(config, run, on_event)
    build_report(run.path)
    return result


def _evolve(config: EvolveConfig, run: Run, on_event: OnEvent) -> Result:
    from loralab.evolution.trainer import evolve

    return evolve(config, run, on_event)


def _fine_tune(config: SftConfig, run: Run, on_event: OnEvent) -> Result:
    from loralab.gradient.fine_tune import fine_tune

    return _watched(fine_tune, config, run, on_event)


def _pretrain(config: PretrainConfig, run: Run, on_event: OnEvent) -> Result:
    from loralab.gradient.pretrain import pretrain

    return _watched(pretrain, config, run, on_event)


def _align(config: DpoConfig, run: Run, on_event: OnEvent) -> Result:
    from loralab.gradient.align import align

    return _watched(align, config, run, on_event)


def _reinforce(config: GrpoConfig, run: Run, on_event: OnEvent) -> Result:
    from loralab.gradient.reinforce import reinforce

    return _watched(reinforce, config, run, on_event)


def _verify(config: VerifierConfig, run: Run, on_event: OnEvent) -> Result:
    from loralab.gradient.verify import verify

    return _watched(verify, config, run, on_event)


def _classify(config: ClassifyConfig, run: Run, on_event: OnEvent) -> Result:
    from loralab.gradient.classify import classify

    return _watched(classify, config, run, on_event)


def _seq2seq(config: Seq2SeqConfig, run: Run, on_event: OnEvent) -> Result:
    from loralab.gradient.seq2seq import seq2seq

    return _watched(seq2seq, config, run, on_event)


def _distill(config: DistillConfig, run: Run, on_event: OnEvent) -> Result:
    from loralab.gradient.distill import distill

    return _watched(distill, config, run, on_event)


def _watched(
    train: Callable[..., Result], config: AnyConfig, run: Run, on_event: OnEvent
) -> Result:
    """Train until it is done or a signal comes; what went wrong with numbers is on the page too."""
    from loralab.gradient.loop import NonFiniteError

    def said(name: str) -> None:
        on_event(Notice(f"{name}: stopping after the step in flight; again to stop at once"))

    with Interrupt(said) as interrupt:
        try:
            return train(config, run, on_event, lambda: interrupt.requested)
        except NonFiniteError:
            build_report(run.path)
            raise


def _ablate(config: AblationConfig, run: Run, on_event: OnEvent) -> Result:
    from loralab.gradient.ablation import ablate

    def said(name: str) -> None:
        on_event(Notice(f"{name}: stopping after the run in flight; again to stop at once"))

    with Interrupt(said) as interrupt:
        return ablate(config, run, on_event, lambda: interrupt.requested)


def _discard(run: Run, existed: bool) -> None:
    """Take away a run that never began; whatever else lies in the directory stays."""
    run.close()
    for name in ("config.yaml", "environment.json", "timings.json", ".lock"):
        with contextlib.suppress(OSError):
            (run.path / name).unlink()
    shutil.rmtree(run.path / START, ignore_errors=True)
    if not existed:
        with contextlib.suppress(OSError):
            run.path.rmdir()
