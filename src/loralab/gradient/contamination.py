"""Before training: rows that hold what the run will be evaluated on, refused or left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from loralab import tasks
from loralab.config.training import ContaminationConfig
from loralab.data.check import contamination
from loralab.data.documents import Document
from loralab.gradient.events import OnTrainingEvent, Remark
from loralab.tasks.base import Task
from loralab.tasks.documents import documents


def contaminated(
    train: Iterable[Document],
    own: Mapping[str, Sequence[Document]],
    config: ContaminationConfig,
    on_event: OnTrainingEvent,
) -> frozenset[str]:
    """Places of the training rows to leave out, as the config's `contamination` says.

    own: what the run itself is evaluated on, by name; the tasks of `against` come to it.

    Raises:
        UserError: a training row holds an evaluated one and action is "error"; names the first.
    """
    if config.action == "off":
        return frozenset()
    evaluated = dict(own)
    for wanted in config.against:
        task = tasks.get(wanted.name, **wanted.options)
        held = [*evaluated.get(task.name, ()), *documents(task, "test")]
        evaluated[task.name] = held
    found = contamination(train, evaluated)
    if config.action == "error":
        found.refuse_rows()
        return frozenset()
    places = frozenset(overlap.train for overlap in found.rows)
    if places:
        first = found.rows[0]
        on_event(
            Remark(
                f"contamination: {len(places)} training rows left out that hold rows of "
                f"{', '.join(sorted({row.task for row in found.rows}))}, such as {first.train} "
                f"(example {first.example})"
            )
        )
    return places


def contaminated_examples(
    task: Task, config: ContaminationConfig, on_event: OnTrainingEvent
) -> frozenset[str]:
    """As `contaminated`, for a task's training examples against its own test split."""
    if config.action == "off":
        return frozenset()
    own = {task.name: documents(task, "test")}
    return contaminated(documents(task, "train"), own, config, on_event)
