"""The stages of a pipeline, one after the other, in a run directory that holds each one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loralab import config as configs
from loralab import pipeline
from loralab.config import AnyConfig, EvalConfig, PipelineConfig
from loralab.config.distill import DistillConfig
from loralab.config.references import Reference, references, replaced, texts
from loralab.errors import UserError
from loralab.evolution.events import Event, Notice
from loralab.gradient.events import TrainingEvent
from loralab.report.stages import TABLE, markdown
from loralab.run import Run
from loralab.stages.digest import plain_inputs, stage_digest
from loralab.stages.outputs import Left
from loralab.stages.record import Record, directory_of
from loralab.stages.table import rows

OnEvent = Callable[[Event | TrainingEvent], None]


@dataclass(frozen=True)
class Staged:
    """complete: False if it stopped at a signal. ran, skipped: names of stages."""

    complete: bool
    ran: tuple[str, ...]
    skipped: tuple[str, ...]


def run_stages(
    config: PipelineConfig, run: Run, on_event: OnEvent, stopping: Callable[[], bool]
) -> Staged:
    """Run every stage that is not there yet, made from the same; write the table after each.

    A stage that was killed goes on where it was. One whose config, inputs or data changed begins
    anew in a directory beside the old one, and so do those that read what it leaves, if that is
    another then.

    Raises:
        UserError: something the user can mend, with the stage's name; what is done is kept.
    """
    stages, record = config.parsed(), Record(run)
    left: dict[str, Left] = {}
    ran: list[str] = []
    skipped: list[str] = []

    def say(text: str) -> None:
        on_event(Notice(text))

    for number, (name, stage) in enumerate(stages.items(), 1):
        if stopping():
            return Staged(False, tuple(ran), tuple(skipped))
        wanted = references(stage.to_dict(), f"stage {name}")
        digests = {str(r): left[r.stage].digest(r.output, say) for r in wanted}
        entry = record.place(name, stage_digest(stage, digests))
        actual = _resolved(stage, wanted, left, say)
        place = directory_of(run, entry)
        left[name] = Left(name, actual, place)
        if entry.complete:
            say(f"stage {name} ({number} of {len(stages)}): unchanged, kept in {entry.directory}/")
            skipped.append(name)
            continue
        if stopping():  # a merge takes its time
            return Staged(False, tuple(ran), tuple(skipped))
        say(f"stage {name} ({number} of {len(stages)}): {stage.kind}, in {entry.directory}/")
        _refuse_moved(actual, wanted, place)
        record.began(entry, plain_inputs(digests, actual))
        if not _run_one(name, actual, place, on_event):
            return Staged(False, tuple(ran), tuple(skipped))
        record.finished(entry)
        ran.append(name)
        _write_table(config, run, left)
    _write_table(config, run, left)
    return Staged(True, tuple(ran), tuple(skipped))


def _resolved(
    stage: AnyConfig,
    wanted: list[Reference],
    left: Mapping[str, Left],
    say: Callable[[str], None],
) -> AnyConfig:
    """The stage's config with a path in the place of each reference; an adapter that answers
    stands on the base it was trained on, quantised as that was."""
    paths = {r.key: str(left[r.stage].path(r.output, say)) for r in wanted}
    values = replaced(stage.to_dict(), lambda key, text: paths.get(key, text))
    answering = {"": values} if isinstance(stage, DistillConfig) else {}
    if isinstance(stage, EvalConfig):
        answering = {f"models.{name}.": own for name, own in values["models"].items()}
    trained = {r.key: left[r.stage].config for r in wanted}
    for place, own in answering.items():
        if own["quantization"] is None and f"{place}adapter" in trained:
            own["quantization"] = getattr(trained[f"{place}adapter"], "quantization", None)
    return configs.parse(values, f"stage {stage.name}")


def _refuse_moved(actual: AnyConfig, wanted: list[Reference], place: Path) -> None:
    """A stage goes on with the paths that it began with: they stand in its config and journal."""
    if not (place / "config.yaml").exists():
        return
    before, now = dict(texts(Run.open(place).config)), dict(texts(actual.to_dict()))
    for reference in wanted:
        if before.get(reference.key) != now[reference.key]:
            raise UserError(
                f"stage {actual.name}: was begun with {reference} at {before.get(reference.key)}, "
                f"which is {now[reference.key]} now, moved or made anew: put it back to go on, or "
                f"remove {place} to begin the stage anew"
            )


def _run_one(name: str, config: AnyConfig, place: Path, on_event: OnEvent) -> bool:
    """Begin a stage, or go on with it; whether it came to its end."""
    try:
        if (place / "config.yaml").exists():
            _, result = pipeline.resume(place, config, on_event)
        else:
            _, result = pipeline.start(config, place, on_event)
    except UserError as error:
        raise UserError(f"stage {name}: {error}") from error
    return result.complete


def _write_table(config: PipelineConfig, run: Run, left: Mapping[str, Left]) -> None:
    table = rows(config, run, left)
    run.write(f"{TABLE}.json", json.dumps(table, indent=2) + "\n")
    run.write(f"{TABLE}.md", markdown(table))
