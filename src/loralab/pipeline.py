"""From a config to a finished run directory with its report."""

from __future__ import annotations

import contextlib
from datetime import datetime
from pathlib import Path

from loralab import config as configs
from loralab.config import EvolveConfig
from loralab.errors import UserError
from loralab.evolution.events import OnEvent
from loralab.evolution.trainer import Result, evolve
from loralab.report import build_report
from loralab.run import Run


def default_directory(name: str) -> Path:
    """runs/NAME-DATE-TIME, with a number behind it if there is one already."""
    wanted = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = wanted, 2
    while path.exists():
        path, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return path


def start(config: EvolveConfig, directory: Path, on_event: OnEvent) -> tuple[Run, Result]:
    """Run a config in a new directory, to the report.

    Raises:
        UserError: something the user can mend. If the search never began, the directory is
            removed again, so that the mended command can be repeated as it is.
    """
    existed = directory.exists()
    run = Run.create(directory, config.to_dict())
    try:
        return run, _finish(config, run, on_event)
    except UserError:
        if not run.journal_path.exists():
            _discard(run, existed)
        raise
    finally:
        run.close()


def resume(directory: Path, config: EvolveConfig | None, on_event: OnEvent) -> tuple[Run, Result]:
    """Continue the run in a directory. A config, if given, has to equal the one it started with.

    Raises:
        UserError: there is no such run, its config differs, or something the user can mend.
    """
    run = Run.resume(directory, None if config is None else config.to_dict())
    with run:
        stored = configs.parse(run.config, str(directory / "config.yaml"))
        return run, _finish(stored, run, on_event)


def _finish(config: EvolveConfig, run: Run, on_event: OnEvent) -> Result:
    result = evolve(config, run, on_event)
    build_report(run.path)
    return result


def _discard(run: Run, existed: bool) -> None:
    """Take away a run that never began; whatever else lies in the directory stays."""
    run.close()
    for name in ("config.yaml", "environment.json", "timings.json", ".lock"):
        with contextlib.suppress(OSError):
            (run.path / name).unlink()
    if not existed:
        with contextlib.suppress(OSError):
            run.path.rmdir()
