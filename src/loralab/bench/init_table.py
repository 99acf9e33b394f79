"""The page of the starts' benchmark: its tables, and the raw data behind them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from loralab.bench.command import in_words
from loralab.bench.init_lab import KINDS
from loralab.bench.table import Cell, Section, Table


def published(page: Path, key: str, default: Any) -> Any:
    """What the raw data behind a page holds."""
    raw = page.with_suffix(".json")
    if not raw.exists():
        return default
    return json.loads(raw.read_text(encoding="utf-8")).get(key, default)


def table(trials: Sequence[Mapping[str, Any]], peaks: Mapping[str, float]) -> Table:
    """The page: step 0, fine-tuning, evolution; mean ± standard deviation over seeds.

    trials: of one setting, one at least. peaks: memory in GB by label, of those that were measured.
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
    about = [trial["meta_info"] for trial in trials]
    facts = {
        "Command": _each(f"`{row['command']}`" for row in rows),
        "Machine": _each(made["system_info"]["machine"] for made in about),
        "Dates": _each(sorted(trial["run_info"]["created_at"][:10] for trial in trials)),
        "Seeds": ", ".join(map(str, seeds)),
        "Trials": ", ".join(f"{label} {len(by[label])}" for label in labels),
        "Budget": ", ".join(f"{k} {v}" for k, v in rows[0]["setting"]["budget"].items()),
        "Raw": "the JSON beside this page, each trial in the schema of PEFT's method_comparison",
        "Versions": _each(in_words(made["package_info"]) for made in about),
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


def _each(values: Iterable[str]) -> str:
    """Different values, each once."""
    return "; ".join(dict.fromkeys(values))


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
