"""The page of `loralab bench collapse`, made of what its runs left in their folders."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from loralab import durable
from loralab.bench import command
from loralab.bench.table import Cell, Section, Table
from loralab.errors import UserError
from loralab.health.causes import CAUSES
from loralab.health.findings import Finding
from loralab.health.reading import Reading
from loralab.health.rules import causes, judge
from loralab.health.text import Answer, statistics
from loralab.report.chart import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    Chart,
    along,
    finish,
    legend,
    percent_axis,
    title,
)
from loralab.report.health import texts_by_look
from loralab.report.text import visible

PAGE = Path("docs/collapse.md")
BASE, PADDED = "base", "padded"
"""Runs: what trains nothing, and what has the fault."""
LOSSES, TEXTS, DONE = "losses.jsonl", "texts.jsonl", "done.json"
_READINGS, _FINDINGS = "readings.jsonl", "findings.jsonl"
_SHOWN = (
    "text.newlines",
    "text.whitespace",
    "text.eos_rate",
    "kl",
    "loss.whitespace",
    "loss.content",
    "data.newline_share",
)
_OF_STRINGS = ("newlines", "whitespace", "empty")
"""Values of a text that need no token ids."""
_ASKED = 2
"""Held-out prompts whose texts are shown."""
_LONGEST = 300
"""Characters of a text."""
_LAST = 10
"""Steps at the end of a training over which its loss is a mean."""
_RUN = re.compile(r"\n(⏎ × \d+)\n")

Rows = Sequence[Mapping[str, Any]]


def page(runs: Mapping[str, Path], command_line: str) -> Table:
    """The story of the runs.

    Raises:
        UserError: one is not finished.
    """
    kept: dict[str, dict[str, Any]] = {}
    for name, path in runs.items():
        if not (path / DONE).is_file():
            raise UserError(f"bench collapse: no finished run in {path}; leave out --table-only")
        kept[name] = {
            "facts": json.loads((path / DONE).read_text(encoding="utf-8")),
            "losses": durable.read_lines(path / LOSSES),
            "texts": durable.read_lines(path / TEXTS),
            "readings": durable.read_lines(path / _READINGS),
            "findings": durable.read_lines(path / _FINDINGS),
        }
    sections = [_scores(kept)]
    files = {}
    for name, one in kept.items():
        if name == BASE:
            continue
        found = [Finding.from_json(row) for row in one["findings"]]
        chart = _chart(name, one["losses"], found)
        figure = f"collapse-{name}.png"
        files[figure] = chart.png
        sections += [
            _course(name, one, found, f"![{chart.alt}]({figure})"),
            _texts(name, one["texts"]),
            _told(name, found),
            _looks(name, [Reading.from_json(row) for row in one["readings"]]),
            _seen(name, one["readings"]),
        ]
    facts = {"command": command_line, **command.facts("loralab", "torch", "peft", "trl")}
    return Table("The newline collapse", facts, sections, kept, files)


def _scores(kept: Mapping[str, Mapping[str, Any]]) -> Section:
    """All held-out problems, by who wrote."""
    by = {"the published solutions": kept[BASE]["facts"].get("gold")}
    by |= {name: kept[name]["facts"]["score"] for name in sorted(kept, key=lambda n: n != BASE)}
    rows: list[list[Cell]] = [
        [who, _of(made["written"], made), _of(made["passed"], made), _share(made["newlines"])]
        for who, made in by.items()
        if made
    ]
    intro = (
        "One pair of ten, which no run has learned, answered greedily. `a function`: Python, with "
        "a statement behind the docstring. `newlines`: of the text's characters. The problems are "
        "of the same two sets as those learned: a check of the two runs, and no score to compare "
        "with published ones."
    )
    columns = ["who wrote", "a function", "passes its tests", "newlines"]
    return Section("Held-out problems", intro, columns, rows)


def _of(count: int | None, made: Mapping[str, Any]) -> Cell:
    return None if count is None else f"{count} of {made['problems']}"


def _share(value: float | None) -> Cell:
    return None if value is None or value != value else f"{value:.0%}"


def _course(name: str, one: Mapping[str, Any], found: Sequence[Finding], figure: str) -> Section:
    facts, losses = one["facts"], one["losses"]
    training, tried = trained(losses), [row for row in losses if "held_out" in row]
    places = [0, *(row["step"] for row in tried[1:])]
    between = [None, *(_mean(training[a:b]) for a, b in pairwise(places))]
    rows: list[list[Cell]] = [
        [
            row["step"],
            mean,
            row["held_out"],
            row["clean"],
            _share(row["newlines"]),
            _of(row["written"], row),
        ]
        for row, mean in zip(tried, between, strict=True)
    ]
    intro = (
        f"{facts['rows']} rows, {facts['learned']:,} learned tokens, {facts['newlines']:.0%} of "
        "them newlines alone. Losses are nats a learned token: of the training's steps since the "
        "line before; of held-out rows made like the training's; of the same rows without "
        "padding. `newlines` and `a function`: of what the model writes to these rows' prompts."
    )
    columns = ["step", "training loss", "held-out loss", "the same, no padding", "newlines"]
    columns.append("a function")
    notes = [figure, *_falls(training, tried), *_verdict(found), *_by_these(one["texts"])]
    return Section(f"{name}: loss and text", intro, columns, rows, notes)


def trained(losses: Rows) -> list[float]:
    """The loss of each step."""
    by_step = {row["step"]: row["training"] for row in losses if "training" in row}
    return [by_step[step] for step in sorted(by_step)]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _falls(training: Sequence[float], tried: Rows) -> list[str]:
    if not training or not tried:
        return []
    first, last = training[0], fmean(training[-_LAST:])
    before, after = tried[0]["held_out"], tried[-1]["held_out"]
    return [
        f"Training loss {first:.3f} at the first step, {last:.3f} over the last "
        f"{min(_LAST, len(training))} ({last / first - 1:+.0%}); held-out loss {before:.3f} → "
        f"{after:.3f} ({after / before - 1:+.0%})."
    ]


def _verdict(found: Sequence[Finding]) -> list[str]:
    if not found:
        return ["The guard found nothing."]
    said = [f"The guard's first FAIL {what}." for what in _firsts(found).values()]
    if said:
        step = next(one.step for one in found if one.severity == "fail")
        said.append(f"Causes named then: {_named([one for one in found if one.step <= step])}.")
    else:
        said.append("The guard did not FAIL.")
    return [" ".join([*said, f"Causes of all that it found: {_named(found)}."])]


def _named(found: Sequence[Finding]) -> str:
    """The two likeliest."""
    return "; ".join(f"`{cause}` ({CAUSES[cause]})" for cause in causes(found)[:2])


def _by_these(texts: Rows) -> list[str]:
    """What the guard's rules on text say of the held-out answers, which its own prompts are not."""
    asked = list(dict.fromkeys(row["prompt"] for row in texts))
    steps = list(dict.fromkeys(row["step"] for row in texts))
    of = {(row["step"], row["prompt"]): row["text"] for row in texts}
    for step in steps:
        values: dict[str, float] = {}
        # Before the first step an adapter with B = 0 is the base.
        for prefix, at in (("", step), ("base.", steps[0])):
            answers = [Answer(prompt, of[at, prompt], (), False) for prompt in asked]
            made = statistics(answers)
            values |= {f"{prefix}text.{name}": made[name] for name in _OF_STRINGS}
        failed = [one for one in judge([Reading(step, values, (), 0.0)]) if one.severity == "fail"]
        if failed:
            said = "; ".join(f"`{one.rule}`: {one.message}" for one in failed)
            return [
                f"Judged by the held-out answers above instead of what the guard's own "
                f"prompts bring, the text FAILs at step {step}: {said}."
            ]
    return ["Judged by the held-out answers above, the text does not FAIL."]


def _firsts(found: Sequence[Finding]) -> dict[int, str]:
    """By step, the first failure, and the first of the text alone."""
    fails = [one for one in found if one.severity == "fail"]
    said = {}
    if fails:
        said[fails[0].step] = f"is at step {fails[0].step}, `{fails[0].rule}`"
    text = [one for one in fails if one.rule.startswith("text.")]
    if text and text[0].step not in said:
        said[text[0].step] = f"by the text alone is at step {text[0].step}, `{text[0].rule}`"
    return said


def _texts(name: str, texts: Rows) -> Section:
    asked = list(dict.fromkeys(row["prompt"] for row in texts))
    asked = asked[:: max(1, len(asked) // _ASKED)][:_ASKED]
    rows: list[list[Cell]] = [
        [_code(f"...{prompt[-60:]}"), row["step"], _code(row["text"])]
        for prompt in asked
        for row in texts
        if row["prompt"] == prompt
    ]
    return Section(f"{name}: the text", "", ["asked", "step", "writes"], rows)


def _seen(name: str, readings: Rows) -> Section:
    """What the guard itself asked and read."""
    views = texts_by_look(readings)[:_ASKED]
    rows: list[list[Cell]] = []
    for view in views:
        prompt = _code(view["prompt"])
        rows.append([prompt, "base", _code(view["base"])])
        before = view["base"]
        for row in view["rows"]:
            if row["completion"] != before:
                rows.append([prompt, f"step {row['step']}", _code(row["completion"])])
            before = row["completion"]
    intro = "Two of the guard's own prompts, at the looks where the answer changed."
    return Section(f"{name}: what the guard read", intro, ["asked", "by", "writes"], rows)


def _code(text: str) -> str:
    """Text on one line of a table, as it stands; runs of newlines counted."""
    shown = _RUN.sub(r"\1 ", visible(text, _LONGEST)).rstrip().replace("\n", "⏎")
    if not shown:
        return "(nothing)"
    ticks = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (ticks + 1)
    return f"{fence} {shown} {fence}" if ticks else f"`{shown}`"


def _looks(name: str, readings: Sequence[Reading]) -> Section:
    rows: list[list[Cell]] = (
        [["base", *(readings[0].values.get(f"base.{value}") for value in _SHOWN)]]
        if readings
        else []
    )
    rows += [
        [f"step {one.step}", *(_number(one.values.get(value)) for value in _SHOWN)]
        for one in readings
    ]
    return Section(f"{name}: what the guard measured", "", ["", *_SHOWN], rows)


def _number(value: float | None) -> float | None:
    return None if value is None or value != value else float(value)


def _told(name: str, found: Sequence[Finding]) -> Section:
    rows: list[list[Cell]] = [
        [one.step, one.severity.upper(), one.rule, one.message, one.cause, one.advice]
        for one in found
    ]
    columns = ["step", "", "rule", "measured", "cause", "advice"]
    return Section(f"{name}: what the guard said", "" if rows else "Nothing.", columns, rows)


def _chart(name: str, losses: Rows, found: Sequence[Finding]) -> Chart:
    training, tried = trained(losses), [row for row in losses if "held_out" in row]
    steps = [row["step"] for row in tried]

    def draw(axes: Any) -> None:
        axes.plot(range(1, len(training) + 1), training, color=FAINT, lw=1, label="training loss")
        held = [row["held_out"] for row in tried]
        axes.plot(steps, held, color=BLUE, marker="o", ms=4, label="held-out loss")
        top = max([*training, *held])
        axes.set_ylim(-0.03 * top, 1.03 * top)
        axes.set_ylabel("nats a token")
        along(axes, "step")
        right = axes.twinx()
        right.grid(visible=False)
        newlines = [row["newlines"] for row in tried]
        right.plot(steps, newlines, color=ORANGE, marker="s", ms=4, label="newlines in the text")
        written = [row["written"] / row["problems"] for row in tried]
        right.plot(steps, written, color=GREEN, marker="^", ms=4, label="answers with a function")
        percent_axis(right)
        for step in _firsts(found):
            axes.axvline(step, color=INK, linewidth=1, linestyle="--", label="the guard's FAIL")
        title(axes, f"{name}: losses and text")
        legend(axes)

    first, last = (tried[0], tried[-1]) if tried else ({}, {})
    alt = ", ".join(
        f"{label} {first.get(key, 0):.2f} to {last.get(key, 0):.2f}"
        for label, key in (("held-out loss", "held_out"), ("share of newlines", "newlines"))
    )
    return finish(name, f"{name}: {alt}", "Dashed: the guard's FAIL.", draw)
