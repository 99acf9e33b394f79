"""What a training run leaves behind: the adapter or the model, and lines that can be taken back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loralab import durable
from loralab.gradient.events import OnTrainingEvent, Remark
from loralab.gradient.loop import NonFiniteError, checkpoints, step_of
from loralab.health.findings import Finding
from loralab.run import Run


def save_trained(model: Any, tokenizer: Any, base: str, run: Run) -> Path:
    """Write the adapter in PEFT's format to `adapter/`, or a model trained whole to `model/`.

    An adapter whose start was taken out of the base's weights is written relative to the true
    base, at twice the rank. Only the process that leads the run writes.

    Raises:
        UserError: the disk refused; the files before are untouched.
    """
    if not run.leads:
        return run.adapter
    if not hasattr(model, "peft_config"):

        def write_model(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        return durable.publish(run.path / "model", write_model)

    from loralab.adapters.extract import state_of
    from loralab.adapters.true_base import base_changed

    def write(folder: Path) -> None:
        model.peft_config["default"].base_model_name_or_path = base
        if base_changed(model):
            state_of(model).save(folder)
        else:
            # "auto" would ask the hub for the base's vocabulary.
            model.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)

    return durable.publish(run.adapter, write)


def rewind(run: Run, step: int) -> None:
    """Forget metrics and completions after `step`, and the last evaluation, before they are made
    again."""
    for name, rows in (
        ("metrics.jsonl", run.metrics()),
        ("completions.jsonl", run.completions()),
    ):
        kept = [r for r in rows if r.get("step", 0) <= step and r.get("phase") != "after"]
        if len(kept) < len(rows):
            run.write(name, "".join(json.dumps(row) + "\n" for row in kept))


def resumed(run: Run) -> tuple[Path | None, int]:
    """Where to go on: the newest checkpoint that is as it was written and its step, None and 0
    without any. What was written down after it is forgotten, and one that changed on disk is a
    finding, and out of the way under another name."""
    found = checkpoints(run.checkpoints)
    damaged = []
    while found and (why := durable.broken(found[-1])) is not None:
        damaged.append((found.pop(), why))
    step = step_of(found[-1]) if found else 0
    rewind(run, step)
    for place, why in damaged if run.leads else ():
        with durable.explain_os_errors(place):
            aside = place.with_name(f"damaged-{place.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(place, aside)
        run.log_finding(
            {
                "rule": "damaged_checkpoint",
                "what": f"{place} changed after it was written ({why}); the run goes on at step "
                f"{step}",
                "why": "a flipped bit or a cut file would be trained on in silence",
                "advice": f"look at the disk; what was there is kept in {aside.name}",
            }
        )
    return (found[-1] if found else None), step


@contextmanager
def kept_when_not_finite(model: Any, tokenizer: Any, base: str, run: Run) -> Iterator[None]:
    """Save the weights of the step before, and say why, when training ends in a NonFiniteError."""
    try:
        yield
    except NonFiniteError as error:
        folder = "adapter" if hasattr(model, "peft_config") else "model"
        run.log_finding(
            not_finite(
                error,
                f"{folder}/ holds the weights of the step before; a lower learning rate or a "
                "longer warm-up usually cures it",
            )
        )
        save_trained(model, tokenizer, base, run)
        raise


def not_finite(error: NonFiniteError, advice: str) -> dict[str, Any]:
    """The finding of a training that ended in that error, as the guard would write it."""
    finding = Finding(
        rule="numbers.nan",
        severity="fail",
        step=error.step,
        message=str(error),
        numbers={},
        cause="numbers.nan",
        also=("lr.too_high", "data.all_masked"),
        advice=advice,
    )
    return {"what": "training stopped at a number that is not finite", **finding.to_json()}


def pass_on(notes: Sequence[str], run: Run, on_event: OnTrainingEvent) -> None:
    """What a trainer had to say of its speed, into the run and to the display."""
    if notes:
        run.note(notes=list(notes))
        for note in notes:
            on_event(Remark(note))
