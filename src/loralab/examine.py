"""What `loralab doctor` examines: an adapter, a model, a finished run, a run before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loralab import config as configs
from loralab import durable, tasks
from loralab.config import (
    AnyConfig,
    DpoConfig,
    EvolveConfig,
    GrpoConfig,
    SftConfig,
    TrainingConfig,
)
from loralab.data.sources import read_rows
from loralab.engines.prompts import PromptEncoder
from loralab.errors import UserError
from loralab.gradient.fine_tune import trainable
from loralab.gradient.loop import total_steps
from loralab.gradient.preferences import Preferences
from loralab.gradient.rows import IGNORED, Row, RowEncoder
from loralab.health.data import DataProbe
from loralab.health.doctor import Report, diagnose, diagnose_adapter
from loralab.health.findings import Finding
from loralab.health.ledger import FINDINGS, READINGS
from loralab.health.preflight import Memory, dose, memory
from loralab.health.reading import Reading
from loralab.health.reading_files import is_adapter
from loralab.health.rules import judge
from loralab.health.setup import setup_values
from loralab.models.load import load
from loralab.run import Run
from loralab.tasks.base import Split, Task
from loralab.tasks.documents import documents
from loralab.tasks.supervised import task_of

MAX_LENGTH = 1024
_MOST_ROWS = 2000
_NO_BASE = {"pretrain"}
_OTHERS = {"classify", "seq2seq", "verifier"}


def doctor(
    target: Any,
    base: Any = None,
    data: str | Path | Iterable[Any] | None = None,
    task: str | Task | None = None,
    tokenizer: Any = None,
    *,
    prompts: Sequence[Any] | None = None,
    dtype: str = "bfloat16",
    device: str = "auto",
    max_length: int = MAX_LENGTH,
    overrides: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Sound or broken, why, and what to do.

    target: a PeftModel or another causal language model in memory; or the path of an adapter (of
        PEFT or mlx-lm), of a run's directory, of a config (or a shipped one's name), or a model as
        for `loralab.load`.
    base: what to compare with: a model's name or a model in memory. None takes a PeftModel's own
        true base, or what an adapter's config names.
    data: rows that the adapter learned or is to learn: a file or folder of rows, or records with
        `input_ids` and `labels`.
    task: a task's name or a Task, whose prompts and evaluation are examined too.
    prompts: None takes the 32 shipped ones.
    overrides: key=value of a config.
    options: seed, max_new_tokens, see `loralab.health.doctor.diagnose`.

    Raises:
        UserError: nothing that can be examined, or what it needs cannot be had.

    Example:
        >>> report = doctor("runs/mine/adapter")  # doctest: +SKIP
        >>> report.sound, report.causes  # doctest: +SKIP
    """
    known = tasks.get(task) if isinstance(task, str) else task
    looking: dict[str, Any] = {
        "prompts": prompts,
        "task": known,
        "data": None if data is None else _probe_of(data, max_length),
        **options,
    }
    if not isinstance(target, str | Path):
        if tokenizer is None:
            raise UserError("a model in memory needs its tokenizer: doctor(model, tokenizer=...)")
        second = load(base, dtype, device)[0] if isinstance(base, str) else base
        return diagnose(target, tokenizer, base=second, **looking)
    path = Path(target).expanduser()
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        return examine_run(path, **looking)
    if is_adapter(path):
        report = diagnose_adapter(path, base, tokenizer, dtype=dtype, device=device, **looking)
        return with_history(report, path.parent if path.is_file() else path)
    if path.suffix in {".yaml", ".yml"} or str(target) in configs.shipped():
        return examine_config(configs.load(str(target), overrides), prompts=prompts, **options)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{target}: neither an adapter (adapter_config.json), nor a run (config.yaml), nor a "
            "model (config.json)"
        )
    model, own = load(str(target), dtype, device)
    second = load(base, dtype, device)[0] if isinstance(base, str) else base
    report = diagnose(model, own, base=second, subject=str(target), **looking)
    if second is None:
        alone = "no base to compare with (--base MODEL): only absolute limits were judged"
        report = replace(report, notes=(*report.notes, alone))
    return report


def examine_run(path: Path, **looking: Any) -> Report:
    """What a run's guard measured and found, and the adapter or model that the run left.

    What the adapter itself shows takes the place of what the guard saw of it before; that is told
    as a note, with its step.
    """
    began = time.perf_counter()
    run = Run.open(path)
    config = run.config
    notes: list[str] = []
    left: Report | None = None
    if config.get("kind") in _OTHERS:
        notes.append(f"kind is {config['kind']}: what it trained answers with no text; not run")
    elif run.adapter.is_dir():
        left = diagnose_adapter(
            run.adapter,
            str(config.get("model")),
            dtype=str(config.get("dtype", "bfloat16")),
            device=str(config.get("device", "auto")),
            quantization=config.get("quantization"),
            **looking,
        )
    else:
        left = _left_model(run, looking, notes)
    if left is None:
        name = str(config.get("model")) if config.get("model") else None
        left = Report(str(path), "run", name, ())
    left = with_history(left, path)
    return replace(
        left,
        subject=str(path),
        notes=(*left.notes, *notes),
        seconds=time.perf_counter() - began,
    )


def with_history(report: Report, folder: Path) -> Report:
    """The report, and what a guard wrote into this folder: at its last look, or before."""
    readings = tuple(_parsed(Reading.from_json, durable.read_lines(folder / READINGS)))
    earlier = tuple(_parsed(Finding.from_json, durable.read_lines(folder / FINDINGS)))
    if not readings and not earlier:
        return report
    last = readings[-1].step if readings else 0
    seen = set(report.readings[-1].values) if report.readings else set[str]()
    told = [*judge(readings), *(one for one in earlier if one.step >= last)]
    at_last = {one.rule: one for one in told if not _measured_by(one, seen)}
    others = {(one.rule, one.step): one for one in (*earlier, *told) if one.rule not in at_last}
    known = {one.rule for one in report.findings}
    findings = [*report.findings, *(f for f in at_last.values() if f.rule not in known)]
    findings.sort(key=lambda one: one.severity != "fail")
    notes = [
        f"step {one.step}: {one.severity} {one.rule}: {one.message}"
        for one in sorted(others.values(), key=lambda one: one.step)
    ]
    return replace(
        report,
        findings=tuple(findings),
        readings=(*readings, *report.readings),
        notes=(*report.notes, *notes),
    )


def _measured_by(finding: Finding, names: set[str]) -> bool:
    values = [name for name in finding.numbers if not name.startswith(("limit.", "base."))]
    return bool(values) and all(name in names for name in values)


def examine_config(config: AnyConfig, **options: Any) -> Report:
    """A run before it starts: its rows, its model before the first step, its memory.

    Nothing is trained or written. Rows are looked at up to the first 2,000.

    Raises:
        UserError: a kind that trains no adapter of a language model, or what the run itself would
            refuse.
    """
    began = time.perf_counter()
    if not isinstance(config, SftConfig | DpoConfig | GrpoConfig | EvolveConfig):
        raise UserError(
            f"config {config.name!r}: kind {config.kind} cannot be examined before it starts; "
            "known: sft, dpo, grpo, evolve"
        )
    task = _task_of(config)
    quantization = getattr(config, "quantization", None)
    model, tokenizer = load(config.model, config.dtype, config.device, quantization)
    learns_rows = isinstance(config, SftConfig | DpoConfig)
    rows = (rows_of if learns_rows else _prompt_rows)(task, "train", tokenizer)
    values: dict[str, float] = {"train.step": 0.0}
    notes: list[str] = []
    probe: DataProbe | None = None
    if isinstance(config, EvolveConfig) and config.evolution.noise_on == "weights":
        trained = model
    else:
        texts = [row for row in rows if row.input_ids]
        trained = trainable(model, tokenizer, config, texts, _Notes())  # type: ignore[arg-type]
    if isinstance(config, SftConfig | DpoConfig):
        probe = _training_rows(config.training, task, rows, tokenizer)
        steps = total_steps(max(1, len(task.examples("train"))), config.training)
        settings = config.training
        values |= dose(settings.optimizer, settings.lr, steps, settings.schedule)
    if not isinstance(config, EvolveConfig):
        need = _memory(trained, config.training, rows, learns_rows)
        values |= need.values()
        notes.append(str(need))
    if len(rows) >= _MOST_ROWS:
        notes.append(f"data: the first {len(rows)} rows were looked at")
    report = diagnose(
        trained,
        tokenizer,
        base=None if hasattr(trained, "peft_config") else "now",
        subject=config.name,
        base_name=config.model,
        data=None if probe is None else lambda _: probe,
        values=values | setup_values(trained),
        **options,
    )
    return replace(
        report,
        kind=f"config {config.kind}",
        notes=(*report.notes, *notes),
        seconds=time.perf_counter() - began,
    )


def _training_rows(
    settings: TrainingConfig, task: Task, rows: Sequence[Row], tokenizer: Any
) -> DataProbe:
    count = len(task.examples("train"))
    seen = total_steps(count, settings) * settings.batch_size * settings.grad_accumulation
    return DataProbe(
        [_cut(row, settings.max_length) for row in rows],
        tokenizer,
        max_length=settings.max_length,
        passes=seen / max(1, count),
        documents=documents(task, "train"),
        evaluated={task.name: documents(task, "test")},
    )


def _memory(model: Any, settings: TrainingConfig, rows: Sequence[Row], learned: bool) -> Memory:
    longest = max((len(row.input_ids) for row in rows), default=settings.max_length)
    tokens = sum(len(row.input_ids) for row in rows)
    return memory(
        model,
        settings.batch_size,
        min(settings.max_length, longest) if learned else settings.max_length,
        learned_share=sum(row.learned for row in rows) / tokens if learned and tokens else 1.0,
        optimizer=settings.optimizer,
        checkpointing=settings.gradient_checkpointing,
        fast=settings.fast,
    )


def _prompt_rows(task: Task, split: Split, tokenizer: Any, most: int = 64) -> list[Row]:
    """Prompts alone, for the initialisations that look at text."""
    encoder = PromptEncoder(tokenizer)
    encoded = [encoder.encode(task.prompt(one)) for one in task.examples(split)[:most]]
    return [Row(tuple(ids), (IGNORED,) * len(ids)) for ids in encoded]


def rows_of(task: Task, split: Split, tokenizer: Any, most: int = _MOST_ROWS) -> list[Row]:
    """Rows as training makes them, those with nothing to learn among them."""
    encoder = RowEncoder(tokenizer)
    rows: list[Row] = []
    for example in task.examples(split):
        gold = task.gold(example)
        if gold is not None:
            rows.append(encoder.encode(task.prompt(example), gold))
        if len(rows) == most:
            break
    return rows


def _probe_of(data: Any, max_length: int) -> Callable[[Any], DataProbe]:
    def make(tokenizer: Any) -> DataProbe:
        if not isinstance(data, str | Path):
            return DataProbe(data, tokenizer)
        task = tasks.get("supervised", path=str(data), format=_format(data))
        # The split is the task's own; a file is one thing here.
        rows = [*rows_of(task, "train", tokenizer), *rows_of(task, "test", tokenizer)]
        return DataProbe([_cut(row, max_length) for row in rows], tokenizer, max_length=max_length)

    return make


def _format(data: str | Path) -> str:
    columns = set(read_rows(data)[0].data)
    for name, needed in (
        ("chat", {"messages"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("text", {"text"}),
    ):
        if needed <= columns:
            return name
    raise UserError(
        f"{data}: its columns are {', '.join(sorted(columns))}; expected `messages`, `prompt` and "
        "`completion`, or `text`"
    )


def _cut(row: Row, max_length: int) -> Row:
    return Row(row.input_ids[:max_length], row.labels[:max_length])


def _task_of(config: SftConfig | DpoConfig | GrpoConfig | EvolveConfig) -> Task:
    if isinstance(config, SftConfig):
        return task_of(config)
    if isinstance(config, DpoConfig):
        return Preferences(config.data, config.seed)
    return tasks.get(config.task.name, **config.task.options)


def _left_model(run: Run, looking: Mapping[str, Any], notes: list[str]) -> Report | None:
    """Of a model trained whole, beside the one it was made from."""
    folder = next((f for f in ("model", "merged") if (run.path / f / "config.json").is_file()), "")
    if not folder:
        notes.append("the run has left neither an adapter nor a model (yet)")
        return None
    dtype, device = (
        str(run.config.get(key, value))
        for key, value in (("dtype", "bfloat16"), ("device", "auto"))
    )
    model, tokenizer = load(run.path / folder, dtype, device)
    second = None
    if run.config.get("kind") not in _NO_BASE:
        second = load(str(run.config.get("model")), dtype, device)[0]
    return diagnose(model, tokenizer, base=second, **looking)


def _parsed(read: Callable[[Mapping[str, Any]], Any], lines: Iterable[Mapping[str, Any]]) -> Any:
    """Lines that are of this form; runs of an earlier version have others."""
    for line in lines:
        try:
            yield read(line)
        except (KeyError, TypeError, ValueError):
            continue


class _Notes:
    """Takes what a run would note down."""

    def note(self, **facts: Any) -> None:
        pass
