"""What `loralab doctor` examines: an adapter, a model, a finished run, a run before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loralab import config as configs
from loralab import tasks
from loralab.errors import UserError
from loralab.examine.before import examine_config
from loralab.examine.finished import examine_run, with_history
from loralab.examine.rows import probe_of
from loralab.health.doctor import Report, diagnose, diagnose_adapter
from loralab.health.reading_files import is_adapter
from loralab.models.load import load
from loralab.tasks.base import Task

__all__ = ["doctor"]

MAX_LENGTH = 1024


def doctor(
    target: Any,
    base: Any = None,
    data: str | Path | Iterable[Any] | None = None,
    task: str | Task | None = None,
    tokenizer: Any = None,
    *,
    prompts: Sequence[Any] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    max_length: int = MAX_LENGTH,
    overrides: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Sound or broken, why, and what to do.

    target: a PeftModel or another causal language model in memory; or the path of an adapter (of
        PEFT or mlx-lm), of a run's directory, of a config (or a shipped one's name), or a model as
        for `loralab.load`.
    base: what to compare with: a model's name or a model in memory. None takes a PeftModel's own
        true base, what an adapter's config names, or a run's model.
    data: rows that the adapter learned or is to learn: a file or folder of rows, or records with
        `input_ids` and `labels`.
    task: a task's name or a Task, whose prompts and evaluation are examined too.
    prompts: None takes the 32 shipped ones.
    dtype, device: of what is loaded; None takes a run's or a config's own, else bfloat16 and auto.
    max_length: tokens of a row of `data`.
    overrides: key=value of a config.
    options: seed, max_new_tokens, see `loralab.health.doctor.diagnose`.

    Raises:
        UserError: nothing that can be examined, what it needs cannot be had, or an option that
            this target has no use for.

    Example:
        >>> report = doctor("runs/mine/adapter")  # doctest: +SKIP
        >>> report.sound, report.causes  # doctest: +SKIP
    """
    known = tasks.get(task) if isinstance(task, str) else task
    looking: dict[str, Any] = {
        "prompts": prompts,
        "task": known,
        "data": None if data is None else probe_of(data, max_length),
        **options,
    }
    kind, place = dtype or "bfloat16", device or "auto"
    if not isinstance(target, str | Path):
        _refuse_unused("a model in memory", overrides=overrides)
        if not isinstance(base, str):
            _refuse_unused("a model in memory", dtype=dtype, device=device)
        if tokenizer is None:
            raise UserError("a model in memory needs its tokenizer: doctor(model, tokenizer=...)")
        second = load(base, kind, place)[0] if isinstance(base, str) else base
        return diagnose(target, tokenizer, base=second, **looking)
    path = Path(target).expanduser()
    is_run = (path / "config.yaml").is_file() and not (path / "config.json").is_file()
    if not is_run and not is_adapter(path) and _names_config(target):
        _refuse_unused(f"config {target}", base=base, data=data, tokenizer=tokenizer)
        own = [f"{key}={value}" for key, value in (("dtype", dtype), ("device", device)) if value]
        config = configs.load(str(target), [*overrides, *own])
        return examine_config(config, known, prompts=prompts, **options)
    _refuse_unused(str(target), overrides=overrides)
    if is_run:
        return examine_run(path, base, tokenizer, dtype, device, **looking)
    if is_adapter(path):
        report = diagnose_adapter(path, base, tokenizer, dtype=kind, device=place, **looking)
        return with_history(report, path.parent if path.is_file() else path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{target}: neither an adapter (adapter_config.json), nor a run (config.yaml), nor a "
            "model (config.json)"
        )
    model, found = load(str(target), kind, place)
    second = load(base, kind, place)[0] if isinstance(base, str) else base
    report = diagnose(model, tokenizer or found, base=second, subject=str(target), **looking)
    if second is None:
        alone = "no base to compare with (--base MODEL): only absolute limits were judged"
        report = replace(report, notes=(*report.notes, alone))
    return report


_UNUSED = {
    "overrides": "key=value changes a config only",
    "base": "a config names its own model: model=NAME",
    "data": "a config names its own rows",
    "tokenizer": "a config's model brings its own tokenizer",
    "dtype": "it is examined as it stands",
    "device": "it is examined where it is",
}
"""Why an option says nothing."""


def _refuse_unused(what: str, **given: Any) -> None:
    """Raises UserError for the first option that is given and would not be looked at."""
    for name, value in given.items():
        if value is not None and (name != "overrides" or value):
            shown = " ".join(map(str, value)) if name == "overrides" else f"--{name}"
            raise UserError(f"{shown}: no use for {what}: {_UNUSED[name]}; leave it out")


def _names_config(target: str | Path) -> bool:
    return Path(target).suffix in {".yaml", ".yml"} or str(target) in configs.shipped()
