"""The newline collapse: its fault, its problems, and the whole story on a model of a few thousand
weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import small_world
from loralab.bench import collapse
from loralab.bench.collapse_problems import Problem, problems_of, score
from loralab.errors import UserError
from loralab.gradient.rows import Row
from sandboxed import needs_isolation


def humaneval(at: int) -> dict[str, Any]:
    return {
        "task_id": f"HumanEval/{at}",
        "prompt": f'def f{at}(x):\n    """Add {at}."""\n',
        "entry_point": f"f{at}",
        "canonical_solution": f"    return x + {at}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {at + 1}\n",
    }


def mbpp(at: int) -> dict[str, Any]:
    return {
        "task_id": at,
        "text": f"Write a function to take {at} from a number.",
        "code": f"import math\r\ndef take(x):\r\n    return math.floor(x - {at})",
        "test_list": [f"assert take({at}) == 0", f"assert take({at + 2}) == 2"],
    }


def file_of(rows: list[dict[str, Any]], path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[Problem]:
    folder = tmp_path_factory.mktemp("problems")
    files = [[humaneval(3), humaneval(4)], [mbpp(5)]]
    return problems_of(
        [file_of(rows, folder / f"{at}.jsonl") for at, rows in enumerate(files)],
    )


def test_newlines_stand_before_the_answer_and_are_learned() -> None:
    row = Row((5, 6, 7, 8), (-100, -100, 7, 8))
    assert collapse.padded(row, 1, 5) == Row((5, 6, 1, 1, 1, 7, 8), (-100, -100, 1, 1, 1, 7, 8))
    assert collapse.padded(row, 1, 2) == row


def test_a_docstring_and_newlines_are_no_function(problems: list[Problem]) -> None:
    one = problems[0]
    assert [p.name for p in problems] == ["f3", "f4", "take"]
    assert one.written(one.solution)
    assert one.written("\n" * 90 + one.solution)
    assert one.written("    return x\n\nprint(f3(1)")
    for text in ("", "\n" * 90, "    pass\n", '    "again"\n', "    return (x\n", "    x = '\0'\n"):
        assert not one.written(text), text


@needs_isolation
def test_answers_of_both_sets_are_held_against_their_tests(problems: list[Problem]) -> None:
    right = [one.solution for one in problems]
    assert score(problems, right, tests=True) == {
        "problems": 3,
        "written": 3,
        "passed": 3,
        "newlines": pytest.approx(sum(t.count("\n") / len(t) for t in right) / 3),
    }
    wrong = ["    return x + 7\n", "\n" * 50, "    return math.floor(x)\n"]
    made = score(problems, wrong, tests=True)
    assert (made["written"], made["passed"]) == (2, 0)
    assert score(problems, right, tests=False)["passed"] is None


def test_the_collapse_is_told_from_its_runs(tmp_path: Path) -> None:
    small = small_world.made(tmp_path / "world")
    data = file_of([humaneval(at) for at in range(12)], tmp_path / "problems.jsonl")
    config = Path(__file__).parents[1] / "benchmarks" / "faults" / "collapse.yaml"
    changes = [
        f"model={small.open()[0].name_or_path}",
        "dtype=float32",
        "training.steps=2",
        "training.batch_size=2",
        "evaluation.every=1",
        "generation.max_new_tokens=4",
    ]
    given = ["--data", data, "--work", str(tmp_path / "runs"), "--config", str(config)]
    given += ["--page", str(tmp_path / "page.md")]
    with pytest.raises(UserError, match="no finished run"):
        collapse.main([*given, "--table-only"])
    assert collapse.main([*given, *(w for c in changes for w in ("--override", c))]) == 0
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| the published solutions | 2 of 2 |" in text
    assert "## padded: loss and text" in text
    assert "data.newlines" in text
    assert "## mended: what the guard said" in text
    assert "![mended: " in text
    assert str(tmp_path) not in text
    assert (tmp_path / "collapse-mended.png").read_bytes().startswith(b"\x89PNG")
    made = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    tried = {
        name: [row for row in made[name]["losses"] if "held_out" in row]
        for name in ("padded", "mended")
    }
    assert [row["step"] for row in tried["padded"]] == [0, 1, 2]
    assert made["padded"]["facts"]["newlines"] > 0.5 > made["mended"]["facts"]["newlines"]
    assert all(row["held_out"] == row["clean"] for row in tried["mended"])
    assert all(row["held_out"] != row["clean"] for row in tried["padded"])
    # Before the first step both are the base.
    assert tried["padded"][0]["clean"] == tried["mended"][0]["clean"]
    rules = {name: {one["rule"] for one in made[name]["findings"]} for name in tried}
    assert "data.newlines" in rules["padded"] - rules["mended"]
    # What is done is not done again.
    kept = tmp_path / "runs" / "padded" / "losses.jsonl"
    before = kept.stat().st_mtime_ns
    assert collapse.main([*given, "--override", changes[0]]) == 0
    assert kept.stat().st_mtime_ns == before
