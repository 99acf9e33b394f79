"""The run directory: everything a run writes and a report reads, through one typed class.

    config.yaml  environment.json  metrics.jsonl  completions.jsonl  findings.jsonl
    readings.jsonl  timings.json  journal.jsonl  checkpoints/  adapter/  figures/  report.html

One process writes a run directory at a time (flock on `.lock`); any number may read it. The
class never imports torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from loralab import durable
from loralab.environment import describe
from loralab.errors import UserError
from loralab.movable import differences

_LOGS = ("metrics.jsonl", "completions.jsonl", "findings.jsonl", "readings.jsonl")
_LINES = (*_LOGS, "journal.jsonl")
_LOCK = ".lock"


class Run:
    """A run directory. Make one with `create`, continue one with `resume`, read with `open`."""

    def __init__(self, path: Path, config: dict[str, Any], lock: int | None) -> None:
        self.path = path
        self.config = config
        self.repaired: tuple[str, ...] = ()
        """What was damaged when it was resumed and is set aside, a line each."""
        self._lock = lock

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> Run:
        """Start a run in a new or empty directory and lock it.

        Raises:
            UserError: the directory holds something, is locked, or cannot be written.
        """
        path, plain = Path(path), _plain(config)
        if path.is_dir() and (path / "config.yaml").exists():
            raise _not_empty(path)
        with durable.explain_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            durable.sync_folder(path.parent)
        lock = _lock(path)
        try:
            with durable.explain_os_errors(path):
                # Only what a create cut short leaves behind may be there.
                if any(not _leftover(entry.name) for entry in path.iterdir()):
                    raise _not_empty(path)
            _sweep(path)
            run = cls(path, plain, lock)
            run._write_config()
            run.write("environment.json", json.dumps(describe(), indent=2) + "\n")
        except BaseException:
            os.close(lock)
            raise
        return run

    @classmethod
    def resume(cls, path: str | Path, config: Mapping[str, Any] | None = None) -> Run:
        """Lock an existing run to continue it; torn last lines are cut off, damaged ones of logs
        set aside.

        Raises:
            UserError: there is no run, it is locked, or `config` differs from the one it was
                started with (the differing keys are named) in more than MOVABLE, which is taken
                from `config`.
        """
        path = Path(path)
        stored = _read_config(path)
        if config is not None:
            changed = differences(stored, _plain(config))
            if changed:
                raise UserError(
                    f"{path} was started with another config: {', '.join(changed)}; "
                    "restore the old values to resume, or start anew in another --run-dir"
                )
        lock = _lock(path)
        try:
            _sweep(path)
            for name in _LINES:
                durable.cut_torn_line(path / name)
            run = cls(path, stored, lock)
            run._repair()
            run._note_resumption()
            if config is not None and stored != _plain(config):
                run.config = _plain(config)
                run._write_config()
        except BaseException:
            os.close(lock)
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Read a run, also while another process writes it.

        Raises:
            UserError: there is no run at `path`.
        """
        return cls(Path(path), _read_config(Path(path)), lock=None)

    @classmethod
    def beside(cls, path: str | Path) -> Run:
        """A run that another process of the same launch writes: what is given to it goes nowhere.

        Raises:
            UserError: there is no run at `path`; the processes have to see the same files.
        """
        return _Beside(Path(path), _read_config(Path(path)), lock=None)

    @property
    def leads(self) -> bool:
        """Whether this process writes the run; others may train beside it."""
        return True

    @property
    def journal_path(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def timings_path(self) -> Path:
        return self.path / "timings.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one step's numbers; on disk on return."""
        self._append("metrics.jsonl", [row])

    def metrics(self) -> list[dict[str, Any]]:
        return durable.read_lines(self.path / "metrics.jsonl")

    def log_completions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append texts with their rewards, all in one write."""
        self._append("completions.jsonl", list(rows))

    def completions(self) -> list[dict[str, Any]]:
        return durable.read_lines(self.path / "completions.jsonl")

    def log_finding(self, row: Mapping[str, Any]) -> None:
        """Append one judgement: what, why, advice."""
        self._append("findings.jsonl", [row])

    def findings(self) -> list[dict[str, Any]]:
        return durable.read_lines(self.path / "findings.jsonl")

    def readings(self) -> list[dict[str, Any]]:
        """What the guard measured, look by look."""
        return durable.read_lines(self.path / "readings.jsonl")

    def rewind(self, generation: int) -> None:
        """Forget metrics and completions of `generation` and later, before it is run again, and
        what was answered after the end, which is asked again.

        A run killed between its log and its journal would otherwise report a generation twice.
        """
        self._must_be_writable()
        for name in ("metrics.jsonl", "completions.jsonl"):
            rows = durable.read_lines(self.path / name)
            kept = [
                row
                for row in rows
                if row.get("generation", -1) < generation and row.get("phase") != "after"
            ]
            if len(kept) < len(rows):
                durable.write_whole(
                    self.path / name, "".join(json.dumps(row) + "\n" for row in kept)
                )

    def environment(self) -> dict[str, Any]:
        """What the run ran on, and what `note` added."""
        try:
            loaded = json.loads((self.path / "environment.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def note(self, **facts: Any) -> None:
        """Add facts known only once it runs, such as kernel="native", to environment.json."""
        known = self.environment()
        if any(known.get(key) != value for key, value in facts.items()):
            self.write("environment.json", json.dumps(known | facts, indent=2) + "\n")

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file of the run whole or not at all; `name` is relative to the run directory.

        Raises:
            UserError: full disk or no permission; the previous file is untouched.
        """
        self._must_be_writable()
        target = self.path / name
        if not target.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"{name!r} lies outside the run directory {self.path}")
        durable.write_whole(target, content)
        return target

    def close(self) -> None:
        """Give up the lock. The run can still be read."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write_config(self) -> None:
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        self.write("config.yaml", text)

    def _repair(self) -> None:
        """Set aside what cannot be read of logs, which no run depends on: a damaged line of them
        must not keep it from going on."""
        found = []
        for name in _LOGS:
            if lines := durable.set_damage_aside(self.path / name):
                found.append(f"{self.path / name}: {lines} damaged lines are left out")
        if durable.set_object_aside(self.timings_path):
            found.append(f"{self.timings_path}: damaged; time is counted anew")
        for what in found:
            self.log_finding(
                {
                    "rule": "damaged_log",
                    "what": what,
                    "why": "the file changed after it was written",
                    "advice": "look at the disk; what was there is kept, named .damaged",
                }
            )
        self.repaired = tuple(found)

    def _append(self, name: str, rows: list[Mapping[str, Any]]) -> None:
        self._must_be_writable()
        durable.append_lines(self.path / name, rows)

    def _must_be_writable(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"run {self.path} is open for reading only, or closed")

    def _note_resumption(self) -> None:
        """Keep what differs from the machine the run began on: bit-identity may end there."""
        known, here = self.environment(), describe()
        if not known:
            self.write("environment.json", json.dumps(here, indent=2) + "\n")
            return
        changed = {key: here[key] for key in here if known.get(key) != here[key]}
        resumptions = known.get("resumed_on", [])
        if changed and changed not in resumptions:
            self.note(resumed_on=[*resumptions, changed])


class _Beside(Run):
    """Reads what the leading process writes, and writes nothing but its own timings, for itself."""

    def __init__(self, path: Path, config: dict[str, Any], lock: int | None) -> None:
        super().__init__(path, config, lock)
        self._scratch = Path(tempfile.mkdtemp(prefix="loralab-"))

    @property
    def leads(self) -> bool:
        return False

    @property
    def timings_path(self) -> Path:
        return self._scratch / "timings.json"

    def rewind(self, generation: int) -> None:
        pass

    def write(self, name: str, content: str | bytes) -> Path:
        return self.path / name

    def close(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _append(self, name: str, rows: list[Mapping[str, Any]]) -> None:
        pass


def _lock(path: Path) -> int:
    with durable.explain_os_errors(path):
        handle = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "another"
            os.close(handle)
            raise UserError(
                f"{path} is being written by process {holder}: wait for it or stop it, "
                "or choose another --run-dir"
            ) from error
        except OSError:
            os.close(handle)
            raise
        with contextlib.suppress(OSError):  # the number only serves the message above
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        return handle


def _not_empty(path: Path) -> UserError:
    return UserError(
        f"{path} exists and is not empty: continue it with --resume, or choose another --run-dir"
    )


def _leftover(name: str) -> bool:
    return name == _LOCK or name.startswith(durable.TEMPORARY_PREFIX)


def _sweep(path: Path) -> None:
    """Remove the unfinished files of a writer that was killed; we hold the lock."""
    with durable.explain_os_errors(path):
        for folder in (path, path / "adapter", path / "checkpoints", path / "figures"):
            for partial in folder.glob(durable.TEMPORARY_PREFIX + "*"):
                if partial.is_dir():
                    shutil.rmtree(partial)
                else:
                    partial.unlink()


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.yaml"
    try:
        config = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise UserError(f"no run at {path}: {file} cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: the run is damaged") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no config: the run is damaged")
    return config


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Only what YAML can hold and give back equal: tuples become lists, paths become text."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=_text))
    return plain


def _text(value: object) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence | set | frozenset):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    raise TypeError(f"a config cannot hold a {type(value).__name__}")
