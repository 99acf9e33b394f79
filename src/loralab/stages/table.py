"""The table of a pipeline: a row for each stage, with what an eval stage measured of its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.config import EvalConfig, PipelineConfig
from loralab.config.references import references
from loralab.measure import numbers_in
from loralab.report.line import before_after
from loralab.run import Run
from loralab.stages.outputs import Left


def rows(config: PipelineConfig, run: Run, left: Mapping[str, Left]) -> dict[str, Any]:
    """Plain values for JSON.

    columns: names of what was measured, in order. unfinished: stages that are not there yet. rows:
    by stage; stage, kind, directory,
    parameters (of the model measured, else of the one trained or under the adapter, None where that
    is no directory here), trained
    (numbers that it changed), measures, result (its own report in a line). Models that no stage
    left, such as a base, come first.
    """
    columns: dict[str, None] = {}
    others: list[dict[str, Any]] = []
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for name, stage in config.parsed().items():
        if not isinstance(stage, EvalConfig) or name not in left:
            continue
        measured = Run.open(left[name].directory).metrics()
        for model in stage.models:
            columns |= dict.fromkeys(stage.measures)
            row = _measured(model, [one for one in measured if one["model"] == model])
            origin = _origin(stage, model)
            if origin is None:
                others.append({"stage": model, "kind": "base", "directory": None, **row})
            else:
                by_stage.setdefault(origin, []).append(row)
    made = list(others)
    for name, stage in config.parsed().items():
        if not isinstance(stage, EvalConfig) and name in left:
            place = left[name].directory
            found = by_stage.get(name) or [{"parameters": _whole(left[name]), "measures": {}}]
            own = {
                "stage": name,
                "kind": stage.kind,
                "directory": place.name,
                "trained": _trained(place),
                "result": _result(Run.open(place)),
            }
            made += [{**own, **row} for row in found]
    unfinished = [name for name in config.stages if name not in left]
    return {
        "name": config.name,
        "columns": list(columns),
        "unfinished": unfinished,
        "rows": made,
    }


def _measured(model: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": model,
        "parameters": metrics[0]["parameters"] if metrics else None,
        "measures": {row["measure"]: _numbers(row) for row in metrics},
    }


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("model", "measure", "parameters", "task", "split", "metrics")
    return {
        **{key: value for key, value in row.items() if key not in left_out},
        **row.get("metrics", {}),
    }


def _origin(stage: EvalConfig, model: str) -> str | None:
    """The stage that the model under this name is from: its adapter's, else its model's."""
    found = {r.key: r.stage for r in references(stage.to_dict(), stage.name)}
    return found.get(f"models.{model}.adapter") or found.get(f"models.{model}.model")


def _whole(stage: Left) -> int | None:
    for folder in (stage.directory / "model", Path(stage.config.model)):
        if folder.is_dir():
            return numbers_in(folder)
    return None


def _trained(place: Path) -> int | None:
    for folder in ("model", "adapter"):
        if (place / folder).is_dir():
            return numbers_in(place / folder)
    return None


def _result(run: Run) -> str:
    """What the stage came to by its own report."""
    if run.config["kind"] == "distill":
        last = run.metrics()[-1]
        return f"{last['kept']} of {last['completions']} completions kept"
    if run.config["kind"] == "verifier":
        last = run.metrics()[-1]
        count = run.config["verifier"]["candidates"]
        return (
            f"verify@{count} {last['verify']:.1%}, majority {last['majority']:.1%}, pass@1 "
            f"{last['pass_at_1']:.1%}"
        )
    if run.config["kind"] == "ablation":
        return f"{len(run.metrics())} runs"
    return before_after(run)
