"""What limits are set by: how near healthy runs come to each, and how far faults go."""

from __future__ import annotations

import pytest

from fault_records import (
    item,
    newlines,
    readings,
    record,
    useless,
)
from loralab.bench.faults.margins import margins
from loralab.bench.faults.reached import reached
from loralab.bench.faults.reached import section as limits_section


def test_margins_say_how_near_healthy_runs_come_and_how_far_faults_go() -> None:
    records = {
        item("control", "zero-b", task): newlines(share)
        for task, share in (("code", 0.1), ("list", 0.11), ("word", 0.4))
    }
    records[item("healthy", "lora", "code")] = newlines(0.05)
    far = {"text.newlines": 0.9, "base.text.newlines": 0.0}
    records[item("fault", "newlines-70", "code")] = useless(readings=readings({5: far, 10: {}}))
    # Not harmful, so nothing that has to be told; and a fault of another cause.
    records[item("healthy", "lora", "word")] = newlines(0.0)
    records[item("fault", "newlines-70", "word")] = newlines(0.3)
    records[item("fault", "shuffled", "code")] = useless(readings=readings({5: far}))
    made = margins(records)
    rows = [row for row in made.rows if row[0] == "text.newlines"]
    assert [row[1] for row in rows] == ["text.newlines > 0.5", "text.newlines > base + 0.3"]
    assert rows[0][2:] == [
        "0.4 (small/word/control-zero-b-0, step 5)",
        "0.4 (small/word/control-zero-b-0, step 5)",
        0,
        "newlines-70 0.9 to 0.9 (1 of 1)",
        "word",
    ]
    # No healthy one has newlines > 0.5.
    assert rows[1][3] == "-"
    assert "Of 5 healthy runs, 5 readings" in made.intro
    assert "2 runs of faults that do harm, of 3" in made.intro


def test_margins_read_generations_of_searches() -> None:
    numbers = {"es.informative": 0.3, "es.correct": 0.5, "es.distinct": 0.6}
    records = {
        item("healthy", "search", "word"): record(
            generations=[], numbers=readings({4: numbers, 5: numbers | {"es.distinct": 0.2}})
        )
    }
    rows = {row[1]: row[2] for row in margins(records).rows if row[0] == "es.silent"}
    assert rows["es.distinct < 0.1"] == "0.2 (small/word/healthy-search-0, step 5)"


def test_each_limit_has_the_worst_that_healthy_runs_came_to() -> None:
    base = {"base.text.newlines": 0.1}
    healthy = {
        item("healthy", "lora", "code"): record(
            readings=readings({5: {"text.newlines": 0.55, **base}, 10: {}})
        ),
        item("healthy", "lora", "word"): record(
            readings=readings({5: {"text.newlines": 0.35, **base}})
        ),
    }
    worst = reached(healthy)
    # More than NEWLINES in one run alone, where it is 0.45 over the base's.
    assert worst["NEWLINES_RISE"] == pytest.approx(0.45)
    assert worst["NEWLINES"] == pytest.approx(0.55)
    assert "ENTROPY_RISE" not in worst, "nobody measured it"
    told = {row[0]: row[2] for row in limits_section(healthy).rows}
    assert (told["`NEWLINES`"], told["`ENTROPY_RISE`"]) == ("0.55", "-")


def test_a_limit_from_below_has_the_least_and_acquittals_do_not_count() -> None:
    values = {"train.dose": 0.002, "train.progress": 1.0, "kl": 0.5, "data.newline_share": 0.9}
    healthy = {
        item("healthy", "lora"): record(readings=readings({30: values, 60: values | {"kl": 0.3}}))
    }
    worst = reached(healthy)
    assert worst["DOSE"] == pytest.approx(0.002)
    assert worst["UNMOVED_KL"] == pytest.approx(0.3)
    # `data.shuffled` wants less, and is acquitted by it; `data.newlines` wants more.
    assert worst["LINE_BREAKS"] == pytest.approx(0.9)
