"""The page of the starts' benchmark: its tables, and what of an older page stays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from loralab import durable
from loralab.bench.init_lab import KINDS, Budget
from loralab.bench.table import Cell, Section, Table
from loralab.bench.timing import machine, versions

_MEASURED = "## Measured"
_COMMAND = "- Command: "
_RAW = "bench-inits.json"


def write(made: Table, page: Path) -> None:
    """Write a page's measured part anew, and `bench-inits.json` beside it.

    What stands before the heading of the measured part stays as it is.
    """
    before = f"# {made.title}\n\n"
    if page.exists():
        before = page.read_text(encoding="utf-8").partition(_MEASURED)[0]
    measured = made.markdown().removeprefix(f"# {made.title}\n\n")
    raw = {"title": made.title, "facts": dict(made.facts), **made.data}
    page.parent.mkdir(parents=True, exist_ok=True)
    durable.write_whole(page, f"{before}{_MEASURED}\n\n{measured}")
    durable.write_whole(page.with_name(_RAW), json.dumps(raw, indent=1) + "\n")


def published(page: Path, key: str, default: Any) -> Any:
    """What the page's raw data holds, for a working directory that is gone."""
    raw = page.with_name(_RAW)
    if not raw.exists():
        return default
    return json.loads(raw.read_text(encoding="utf-8")).get(key, default)


def command_on(page: Path) -> str:
    """The command that the page says its trials were made by."""
    lines = page.read_text(encoding="utf-8").splitlines() if page.exists() else []
    return next((x.removeprefix(_COMMAND) for x in lines if x.startswith(_COMMAND)), "not known")


def table(
    trials: Sequence[Mapping[str, Any]], peaks: Mapping[str, float], budget: Budget, command: str
) -> Table:
    """The page: step 0, fine-tuning, evolution; mean ± standard deviation over seeds.

    peaks: memory in GB by label, of those that were measured.
    """
    rows = [trial["loralab"] for trial in trials]
    labels = [kind.label for kind in KINDS if any(r["label"] == kind.label for r in rows)]
    by = {label: [r for r in rows if r["label"] == label] for label in labels}
    first = [
        [
            label, _mean(by[label], "kl_0"), _share(by[label], "agreement_0"),
            _mean(by[label], "wiki_perplexity_0"), _mean(by[label], "own_text_nats"),
            _share(by[label], "garbled"),
            _mean(by[label], "relative_size"), _mean(by[label], "init_cpu_seconds"),
            peaks.get(label),
        ]
        for label in labels
    ]  # fmt: skip
    tuned = [
        [
            label, _at_step(by[label], 4), _at_step(by[label], 8), _at_step(by[label], 12),
            _pm(by[label], "held_out_loss", 4), _share(by[label], "gsm8k_form"),
            _share(by[label], "gsm8k"), _mean(by[label], "effective_rank"),
            _pm(by[label], "forgetting", 4), _mean(by[label], "train_cpu_seconds"),
        ]
        for label in labels
    ]  # fmt: skip
    evolved = [
        [
            label,
            *(_inner(by[label], "conciseness", k) for k in ("start", "final", "train_last")),
            *(_inner(by[label], "countdown", k) for k in ("start", "final", "train_last")),
        ]
        for label in labels
        if any(r.get("conciseness") for r in by[label])
    ]
    seeds = sorted({r["seed"] for r in rows})
    facts = {
        "Command": command,
        "Machine": machine(),
        "Seeds": ", ".join(map(str, seeds)),
        "Trials": ", ".join(f"{label} {len(by[label])}" for label in labels),
        "Budget": ", ".join(f"{k} {v}" for k, v in asdict(budget).items()),
        "Raw": f"[{_RAW}]({_RAW}), each trial in the JSON schema of PEFT's method_comparison",
        "Versions": ", ".join(f"{k} {v}" for k, v in versions("peft", "torch", "trl").items()),
    }
    sections = (
        Section(
            "At step 0",
            "KL from the true base (nats a token, GSM8K test text), agreement of the most likely "
            "token, perplexity on WikiText-2, nats a token that the base gives to what the start "
            f"writes ({_number(rows, 'own_text_nats_of_base')} to its own), share of seeds whose "
            "text is garbled, ||s BA|| / ||W||, processor seconds of the initialisation, highest "
            "resident memory (10^9 bytes) of a process that loads the model, makes the start and "
            "takes one step.",
            (
                "start",
                "KL",
                "top-1",
                "perplexity",
                "own text",
                "garbled",
                "size",
                "init s",
                "peak GB",
            ),
            first,
        ),
        Section(
            "SFT on GSM8K",
            "Training loss at fixed steps, loss on held-out solutions after, share of answers in "
            "GSM8K's form and right, effective rank of the change, change of the loss on "
            "WikiText-2 (forgetting), processor seconds of training.",
            (
                "start",
                "loss 4",
                "loss 8",
                "loss 12",
                "held-out loss",
                "form",
                "right",
                "eff. rank",
                "forgetting",
                "train s",
            ),
            tuned,
        ),
        Section(
            "Evolution",
            "Held-out reward before and after, and training reward in the last generation: on "
            "conciseness from the start itself, on countdown after an SFT warm start from it.",
            (
                "start",
                "concise. before",
                "after",
                "train",
                "countdown before",
                "after",
                "train",
            ),
            evolved,
            ("Absent rows: what evolution refuses (A = 0, a schedule, a replaced base).",),
        ),
    )
    return Table("Initialisations side by side", facts, sections,
                 {"trials": list(trials), "peak_gb": dict(peaks)})  # fmt: skip


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return fmean(values) if values else None


def _number(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    value = _mean(rows, key)
    return "-" if value is None else f"{value:.2f}"


def _share(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    value = _mean(rows, key)
    return "-" if value is None else f"{value:.0%}"


def _pm(rows: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    return _spread([row[key] for row in rows if row.get(key) is not None], digits)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.{digits}f} ± {spread:.{digits}f}"


def _at_step(rows: Sequence[Mapping[str, Any]], step: int) -> Cell:
    values = [row["losses"][step - 1] for row in rows if len(row["losses"]) >= step]
    return fmean(values) if values else None


def _inner(rows: Sequence[Mapping[str, Any]], outer: str, key: str) -> str:
    digits = 1 if outer == "conciseness" else 3
    return _spread([row[outer][key] for row in rows if row.get(outer)], digits)
