"""The tables of the fault benchmark's page, each from judged runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from statistics import median
from typing import Any

from loralab.bench.faults.items import Item
from loralab.bench.faults.judgement import (
    LOOPS_MORE,
    MISREPORTED,
    NATS_LOST,
    SCORE_LOST,
    SIGNIFICANT,
    VISIBLE,
    Judged,
)
from loralab.bench.faults.peers import POINTS, SPARSE
from loralab.bench.faults.plan import Fault
from loralab.bench.faults.statistics import interval
from loralab.bench.table import Cell, Section

Runs = Mapping[Item, Judged]

_FAIL, _WARN = "FAIL (95 %)", "WARN alone"


@dataclass
class Groups:
    """All runs, by what is known of them. unknown: faults without the run to compare them with.
    broken: what broke off, by its error; a fault's is among the harmful too, as missed."""

    harmful: dict[Item, Judged] = field(default_factory=dict)
    benign: dict[Item, Judged] = field(default_factory=dict)
    healthy: dict[Item, Judged] = field(default_factory=dict)
    unknown: dict[Item, Judged] = field(default_factory=dict)
    broken: dict[Item, str] = field(default_factory=dict)


def names_of(item: Item) -> tuple[str, ...]:
    """All names of what it does."""
    return (item.name, *item.also)


def rate(flags: Iterable[bool]) -> str:
    """ "12 of 13: 0.92 (0.64 to 1)"."""
    known = list(flags)
    if not known:
        return "-"
    low, high = interval(sum(known), len(known))
    share = sum(known) / len(known)
    return f"{sum(known)} of {len(known)}: {share:.3g} ({low:.2g} to {high:.2g})"


def middle(values: Iterable[float | int | None]) -> float | None:
    """Median of those that are known."""
    known = [float(value) for value in values if value is not None]
    return float(median(known)) if known else None


def whole(groups: Groups) -> Section:
    """What is to be reached, and how far it is."""
    harmful, healthy = list(groups.harmful.values()), list(groups.healthy.values())
    benign = list(groups.benign.values())
    failed = [one for one in harmful if one.failed]
    rows: list[list[Cell]] = [
        ["harmful faults that FAIL", *_share(one.failed for one in harmful), 0.95],
        ["healthy runs that FAIL", *_share(one.failed for one in healthy), 0.0],
        ["right cause among the first two, of harmful that FAIL",
         *_share(one.named for one in failed), 0.8],
        ["the same, of all harmful", *_share(one.named for one in harmful), None],
        ["FAIL before the validation loss shows it, of harmful in the training",
         *_share(one.before_the_loss for one in harmful if one.has_validation), None],
        ["harmful faults that WARN alone", *_share(one.warned for one in harmful), None],
        ["healthy runs that WARN alone", *_share(one.warned for one in healthy), None],
        ["benign faults that FAIL", *_share(one.failed for one in benign), None],
        ["benign faults that WARN alone", *_share(one.warned for one in benign), None],
    ]  # fmt: skip
    notes = [
        f"Harm, named for each fault before it was run: {SCORE_LOST:g} fewer right answers of the "
        f"task (and p < {SIGNIFICANT:g} of the exact test of the pairs), {NATS_LOST:g} nats a "
        f"token more on held-out stories, {LOOPS_MORE:g} more answers that loop, or a reported "
        f"gain {MISREPORTED:g} off the real one, beside the run without the fault and with the "
        "same seed. Other faults are benign and in no rate of detection. Intervals are Clopper and "
        "Pearson's, as if runs were independent; runs of one fault are not quite.",
        *_lead_notes(harmful),
        *_early_notes([*harmful, *benign]),
    ]
    columns = ["", "runs", "of", "share", "95 % low", "high", "to reach"]
    return Section("All", "", columns, rows, notes)


def _lead_notes(harmful: Sequence[Judged]) -> list[str]:
    """The median lead, of those that FAIL, and with the missed counted as the worst."""
    mine = [one for one in harmful if one.has_validation]
    told = [one.lead for one in mine if one.lead is not None]
    if not told:
        return []
    missed = [-inf] * (len(mine) - len(told))
    strict = median([*told, *missed])
    return [
        f"Median lead of the first FAIL over the validation loss being {VISIBLE:g} times its own "
        "lowest, or that of the run without the fault at the same step, or no number: "
        f"{median(told):g} steps over {len(told)} runs that FAIL"
        + (f", {strict:g} with the {len(missed)} missed as the worst" if isfinite(strict) else "")
        + ". Where it never shows, the lead is to the end of the run. Faults in what is saved, "
        "merged or evaluated have none: no loss could show them."
    ]


def _early_notes(broken: Sequence[Judged]) -> list[str]:
    """What a guard said of something else."""
    early = [one for one in broken if any(found.severity == "fail" for found in one.early)]
    if not early:
        return []
    return [
        f"In {len(early)} runs of faults the guard FAILs before the fault is in (of one in what is "
        "saved, merged or evaluated: at all). That is of something else, and no detection."
    ]


def rates(
    heading: str, of: str, groups: Groups, parts: Mapping[str, Callable[[Item], bool]]
) -> Section:
    """Rates of each part, of the runs that it says are its own."""
    rows: list[list[Cell]] = []
    for name, holds in parts.items():
        hurt, mild, fine = (
            [one for item, one in runs.items() if holds(item)]
            for runs in (groups.harmful, groups.benign, groups.healthy)
        )
        if not (hurt or mild or fine):
            continue
        rows.append(
            [name, rate(one.failed for one in hurt), sum(one.warned for one in hurt),
             _counts(mild), rate(one.failed for one in fine), sum(one.warned for one in fine),
             rate(one.named for one in hurt if one.failed),
             middle(one.delay for one in hurt), middle(one.lead for one in hurt),
             middle(_guard_share(one.record) for one in (*hurt, *fine))]
        )  # fmt: skip
    columns = [of, f"harmful {_FAIL}", f"harmful {_WARN}", "benign FAIL, WARN, of",
               f"healthy {_FAIL}", f"healthy {_WARN}", "cause named, of FAIL (95 %)",
               "steps to FAIL", "lead", "guard's share"]  # fmt: skip
    intro = "Steps to FAIL and lead are medians over harmful runs that FAIL."
    return Section(heading, intro, columns, rows)


def judges(groups: Groups) -> Section:
    """The guard alone, the doctor alone, and both."""
    rows: list[list[Cell]] = []
    for name, kinds in (
        ("guard alone", ("guard",)),
        ("doctor alone", ("doctor",)),
        ("both", ("guard", "doctor")),
    ):
        row: list[Cell] = [name]
        for runs in (groups.harmful, groups.healthy):
            said = [[getattr(one, kind) for kind in kinds] for one in runs.values()]
            row += [
                rate("fail" in words for words in said),
                sum("fail" not in words and "warn" in words for words in said),
            ]
        rows.append(row)
    first = sum(one.by == "guard" for one in groups.harmful.values())
    columns = ["judge", f"harmful {_FAIL}", f"harmful {_WARN}",
               f"healthy {_FAIL}", f"healthy {_WARN}"]  # fmt: skip
    note = f"Of the harmful runs that FAIL, the guard said it first in {first}."
    return Section("Guard and doctor", "", columns, rows, [note])


def leads(groups: Groups, known: Mapping[str, Fault]) -> Section:
    """Who comes first, the guard or the validation loss, by family."""
    rows: list[list[Cell]] = []
    hurt = {item: one for item, one in groups.harmful.items() if one.has_validation}
    families = dict.fromkeys(known[item.name].family for item in hurt)
    for family in (None, *families):
        mine = [o for i, o in hurt.items() if family in (None, known[i.name].family)]
        shown = [one for one in mine if one.shown is not None]
        never = [one for one in mine if one.shown is None]
        if mine:
            rows.append(
                [family or "all", rate(one.before_the_loss for one in mine),
                 middle(one.delay for one in mine), len(shown), middle(one.lead for one in shown),
                 len(never), middle(one.lead for one in never)]
            )  # fmt: skip
    columns = ["family", "FAIL before the loss shows it (95 %)", "steps from injection to FAIL",
               "loss shows it in", "lead there", "never in", "lead there, at least"]  # fmt: skip
    intro = (
        "Of harmful faults that are in the training. Medians are of those that FAIL; missed ones "
        "count in the first rate."
    )
    return Section("Before the validation loss", intro, columns, rows)


def faults(groups: Groups, known: Mapping[str, Fault]) -> Section:
    """Every fault."""
    rows: list[list[Cell]] = []
    for name, fault in known.items():
        hurt, mild, unknown = (
            [one for item, one in runs.items() if item.name == name]
            for runs in (groups.harmful, groups.benign, groups.unknown)
        )
        every = [*hurt, *mild, *unknown]
        if not every:
            continue
        said = [cause for one in every for cause in one.causes[:1]]
        rows.append(
            [name, fault.family, fault.what, fault.harm, f"{len(hurt)} of {len(every)}",
             _counts(hurt), _counts(mild), f"{sum(one.named for one in every)} of {len(every)}",
             max(set(said), key=said.count) if said else "-",
             middle(one.delay for one in hurt), middle(one.lead for one in hurt)]
        )  # fmt: skip
    columns = ["fault", "family", "what", "harm", "harmful", "of harmful FAIL, WARN, of",
               "of benign FAIL, WARN, of", "cause named", "cause told most", "steps to FAIL",
               "lead"]  # fmt: skip
    return Section("Faults", "", columns, rows)


def healthy(groups: Groups) -> Section:
    """Every healthy kind, with the rules that spoke."""
    rows: list[list[Cell]] = []
    for name in dict.fromkeys(name for item in groups.healthy for name in names_of(item)):
        mine = [one for item, one in groups.healthy.items() if name in names_of(item)]
        rows.append(
            [name, rate(one.failed for one in mine),
             _rules(one for one in mine if one.failed), sum(one.warned for one in mine),
             _rules(one for one in mine if one.warned),
             middle(one.record["used"]["score"] for one in mine),
             middle(one.record.get("base", {}).get("score") for one in mine)]
        )  # fmt: skip
    columns = ["healthy run", _FAIL, "rules", _WARN, "rules ", "score", "base's"]
    intro = (
        "Kinds that look like trouble, and what faults are set beside. A run may be of several "
        "kinds (`zero-b` on code is `lora` and `code` too) and is then in several rows; it is once "
        "in every rate above."
    )
    return Section("Healthy runs", intro, columns, rows)


def peers(groups: Groups, names: Sequence[str]) -> Section:
    """The same runs judged by others: where they can see the fault, and over all."""
    rows: list[list[Cell]] = []
    for what in ("in the log", "all"):
        # A crashed run left no log: missed by everyone.
        hurt = [
            one for one in groups.harmful.values()
            if what == "all" or "error" in one.record or (one.peers and one.injected is not None)
        ]  # fmt: skip
        fine = [one for one in groups.healthy.values() if what == "all" or one.peers]
        said: dict[str, list[list[str | None]]] = {
            "loralab": [[_word(one) for one in runs] for runs in (hurt, fine)],
            "loralab, guard alone": [[one.guard for one in runs] for runs in (hurt, fine)],
        }
        said |= {name: [[o.peers.get(name) for o in runs] for runs in (hurt, fine)]
                 for name in names}  # fmt: skip
        ours = [_fails(words) for words in said["loralab"]]
        for judge, words in said.items():
            row: list[Cell] = [judge, what]
            for group in words:
                row += [rate(word == "fail" for word in group), group.count("warn")]
            theirs = [_fails(group) for group in words]
            row += [_beside(ours[0], theirs[0]), _beside(theirs[1], ours[1])]
            rows.append(row if judge in names else [*row[:-2], "-", "-"])
    columns = ["judge", "runs", f"harmful {_FAIL}", f"harmful {_WARN}",
               f"healthy {_FAIL}", f"healthy {_WARN}",
               "loralab on harmful", "on healthy"]  # fmt: skip
    intro = (
        "The same runs by others. They read the log that a Trainer writes at every step. `in the "
        "log`: harmful faults that are in a training by gradients, and healthy runs by gradients; "
        "`all`: also faults in what is saved, merged or evaluated, which such a log does not show "
        "(whatever is said of it counts), and searches, which have none and count as not told."
    )
    notes = [
        "trainproof is asked as its own command asks it, `trainproof epoch trainer_state.json "
        f"--format hf`, and once more (`sparse log`) as if the Trainer had logged every {SPARSE} "
        f"steps, or as rarely as leaves {POINTS} rows; its `compare`, which wants a known good run "
        "of the same kind, is not asked."
        if any("trainproof" in name for name in names)
        else "trainproof is not installed here, and was not asked: pip install 'loralab[peers]'.",
        "The plain rules and the limits on TRL's metrics are in bench/faults/peers.py.",
    ]
    return Section("Beside others", intro, columns, rows, notes)


def costs(runs: Runs) -> Section:
    """What looking took, by model, of runs by gradients and of searches."""
    rows: list[list[Cell]] = []
    done = {item: one for item, one in runs.items() if "error" not in one.record}
    kinds = {item: (item.world, "generations" in one.record) for item, one in done.items()}
    for world, searched in dict.fromkeys(kinds.values()):
        mine = [one.record for item, one in done.items() if kinds[item] == (world, searched)]
        doctor = [float(row["doctor"].get("seconds", 0.0)) for row in mine]
        guard = [float(row["guard_seconds"]) for row in mine]
        shares = [value for row in mine if (value := _guard_share(row)) is not None]
        rows.append(
            [world, "search" if searched else "gradients", len(mine), middle(shares),
             max(shares, default=None), middle(guard), max(guard),
             middle(float(row["train_seconds"]) for row in mine), middle(doctor), max(doctor)]
        )  # fmt: skip
    columns = ["model", "by", "runs", "guard's share", "most", "guard's seconds", "most ",
               "seconds of the run", "doctor's seconds", "most  "]  # fmt: skip
    intro = (
        "Medians. The guard's share is of the time of training without it; runs this short hold "
        "all its first looks, which is what the share is made of."
    )
    return Section("Cost", intro, columns, rows)


def uncounted(groups: Groups, missing: Sequence[Item]) -> Section:
    """What is in no rate, or in one only by its absence."""
    rows: list[list[Cell]] = [
        [str(item.path), "broke off" + ("; counted as missed" if item in groups.harmful else ""),
         error]
        for item, error in groups.broken.items()
    ]  # fmt: skip
    for item, one in groups.unknown.items():
        said = "FAIL" if one.failed else "WARN" if one.warned else "nothing"
        why = "no run without the fault to tell harm by; in no rate"
        rows.append([str(item.path), why, f"told: {said}"])
    rows += [[str(item.path), "not run", "-"] for item in missing]
    intro = "Runs that are not counted as the others are."
    return Section("Not counted", intro, ["run", "what", "how"], rows)


def _fails(words: Sequence[str | None]) -> int:
    return sum(word == "fail" for word in words)


def _beside(better: int, other: int) -> str:
    """Of counts over the same runs."""
    return "better" if better > other else "equal" if better == other else "worse"


def _word(one: Judged) -> str | None:
    return "fail" if one.failed else "warn" if one.warned else None


def _share(flags: Iterable[bool]) -> list[Cell]:
    known = list(flags)
    hits, of = sum(known), len(known)
    return [hits, of, hits / of if of else None, *interval(hits, of)]


def _counts(runs: Sequence[Judged]) -> str:
    failed, warned = sum(one.failed for one in runs), sum(one.warned for one in runs)
    return f"{failed}, {warned}, {len(runs)}" if runs else "-"


def _rules(runs: Iterable[Judged]) -> str:
    return ", ".join(sorted({rule for one in runs for rule in one.rules})) or "-"


def _guard_share(record: Mapping[str, Any]) -> float | None:
    told = record.get("guard_share")
    return float(told) if told is not None and isfinite(float(told)) else None
