"""Countdown: the rule against regular expressions, then real rows, attacks, generator, files."""

from __future__ import annotations

import gzip
import json
import random
import re
from fractions import Fraction
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from loralab import tasks
from loralab.errors import UserError
from loralab.tasks.base import Example, Score
from loralab.tasks.check import check
from loralab.tasks.countdown import Countdown, format_score, last_answer
from loralab.tasks.problems import Problem, problem_from_row, solve
from test_arithmetic import reference as python_value

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "countdown"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data/countdown is not here")


def reference_format(text: str) -> float:
    """The published rule, written with regular expressions (quadratic on hostile text)."""
    if re.match(r"^<think>.*?</think>\n<answer>.*?</answer>$", text, re.DOTALL):
        return 1.0
    think = re.search("<think>.*?</think>", text, re.DOTALL)
    answer = re.search("<answer>.*?</answer>", text, re.DOTALL)
    return (0.1 if think else 0.0) + (0.5 if answer else 0.0)


def reference_answer(text: str, numbers: list[int], target: str) -> float:
    found = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
    if not found or not re.match(r"^[0-9+\-*/() ]+$", found[-1]):
        return 0.0
    if sorted(int(n) for n in re.findall(r"\d+", found[-1])) != sorted(numbers):
        return 0.0
    value = python_value(found[-1].rstrip())
    return 1.0 if value is not None and abs(float(value) - float(target)) < 1e-5 else 0.0


def plain(numbers: list[int], target: Any) -> tuple[Countdown, Example]:
    """A problem whose prompt ends in <think>."""
    data = {"numbers": numbers, "target": target}
    return Countdown(prompt_style="plain"), Example("x", data)


def score(completion: str, numbers: list[int] | None = None, target: Any = 98) -> Score:
    task, example = plain(numbers or [44, 19, 35], target)
    return task.score(example, completion)


PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "\n",
    "44 + 19 + 35",
    "98",
    "x",
    "<think>y</think>\n<answer>",
    "</answer>\n",
]


def test_blocks_are_read_as_the_regular_expressions_read_them() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(20_000):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 8)))
        assert format_score(text) == reference_format(text), text
        found = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
        assert last_answer(text) == (found[-1] if found else None), text
        result = score(text)
        right = reference_answer(text, [44, 19, 35], "98")
        assert result.parts == {"format": reference_format("<think>" + text), "answer": right}
        assert result.reward == pytest.approx(0.1 * result.parts["format"] + right)
        assert result.correct is (right == 1.0)
        seen.add(tuple(result.parts.values()))
    assert len(seen) >= 6


@pytest.mark.parametrize(
    ("completion", "form", "answer"),
    [
        ("Add.</think>\n<answer>44 + 19 + 35</answer>", 1.0, 1.0),
        ("Add.</think>\n<answer>44 + 19 + 35</answer>\n", 1.0, 1.0),
        ("Add.</think>\n<answer>44 + 19 - 35</answer>", 1.0, 0.0),
        ("Add.</think>\n<answer>44 + 19 + 35</answer> done", 0.6, 1.0),
        ("Add.</think><answer>44 + 19 + 35</answer>", 0.6, 1.0),
        ("<answer>44 + 19 + 35</answer>", 0.5, 1.0),
        ("Add.</think> 98", 0.1, 0.0),
        ("98", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("<answer>1</answer> no: <answer>(19+35)+44</answer>", 0.5, 1.0),
        ("<answer>(19+35)+44</answer> or <answer>98</answer>", 0.5, 0.0),
        ("<answer>44 + 54</answer>", 0.5, 0.0),
        ("<answer>44 + 19 + 35 + 35 - 35</answer>", 0.5, 0.0),
        ("<answer>44 + 19 + 35 = 98</answer>", 0.5, 0.0),
        ("<answer>44 + 19 + 35", 0.0, 0.0),
        ("<answer>-(-44) + 19 + 35</answer>", 0.5, 1.0),
    ],
)
def test_scores_by_the_rule(completion: str, form: float, answer: float) -> None:
    result = score(completion)
    assert result.parts == {"format": form, "answer": answer}
    assert result.reward == pytest.approx(0.1 * form + answer)


def test_a_prompt_that_opens_the_thought_is_continued_and_no_other_is() -> None:
    completion = "Add.</think>\n<answer>44 + 19 + 35</answer>"
    data = {"numbers": [44, 19, 35], "target": 98}
    chat = Countdown(prompt_style="chat")
    assert score(completion).reward == pytest.approx(1.1)
    assert chat.score(Example("x", data), completion).parts["format"] == 0.5
    assert chat.score(Example("x", data), "<think>" + completion).reward == pytest.approx(1.1)
    own = Countdown()
    for prompt in (
        "Reach 98.\n<think>",
        "<think>\n",
        [{"role": "assistant", "content": "<think>"}],
    ):
        assert own.score(Example("x", {**data, "prompt": prompt}), completion).parts["format"] == 1
    assert own.score(Example("x", {**data, "prompt": "Reach 98."}), completion).parts["format"] < 1


def test_tolerance_is_strict_and_exact() -> None:
    wrap = "<answer>{}</answer>"
    assert score(wrap.format("1/3"), [1, 3], "0.333333").correct
    assert score(wrap.format("1/3"), [1, 3], 0.33333333).correct
    assert not score(wrap.format("1/3"), [1, 3], "0.3333").correct
    assert not score(wrap.format("1"), [1], "1.00001").correct
    assert score(wrap.format("1"), [1], "1.000009").correct
    assert score(wrap.format("90/(60-76)"), [60, 76, 90], "-5.625").correct


ATTACKS = {
    "power tower": "<answer>44**35**19</answer>",
    "nines": "<answer>9**9**9</answer>",
    "floor division": "<answer>1//0</answer>",
    "parentheses": "<answer>" + "(" * 10_000 + "44+19+35" + ")" * 10_000 + "</answer>",
    "1 MB of digits": "<answer>" + "9" * 1_000_000 + "</answer>",
    "1 MB of sums": "<answer>44+19+35" + "+0" * 500_000 + "</answer>",
    "1 MB of opening tags": "<answer>" * 125_000,
    "1 MB of closing tags": "</answer>" * 111_000,
    "1 MB of empty answers": "<answer></answer>" * 58_000,
    "1 MB of thoughts": "<think>" * 143_000,
    "1 MB of seams": "</think>\n<answer>" * 58_000,
    "1 MB of text": "lorem ipsum " * 83_000,
    "arabic digits": "<answer>٤٤+١٩+٣٥</answer>",
    "fullwidth digits": "<answer>４４+１９+３５</answer>",
    "minuses": "<answer>" + "-" * 1_000_000 + "44+19+35</answer>",
    "leading zeros": "<answer>044+19+35</answer>",
    "surrogate": "<answer>\ud800</answer>",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_earn_no_answer_in_under_10_ms(name: str) -> None:
    task, example = plain([44, 19, 35], 98)
    times = []
    for _ in range(5):
        start = perf_counter()
        result = task.score(example, ATTACKS[name])
        times.append(perf_counter() - start)
        assert result.correct is False
        assert result.reward <= 0.1
    assert min(times) < 0.010


@needs_data
def test_agrees_with_the_reference_on_every_gold_of_countdown_json() -> None:
    rows = json.loads((DATA / "countdown.json").read_text())
    assert len(rows) == 2200
    task = tasks.get("countdown")
    right = {True: 0, False: 0}
    without_gold = null = 0
    for row in rows:
        example = Example(str(row["id"]), row)
        if row["solution"] is not None:
            completion = f" Let me add.</think>\n<answer>{row['solution']}</answer>"
            answer = reference_answer(completion, row["numbers"], row["target"])
            assert task.score(example, completion).reward == pytest.approx(0.1 + answer)
            right[answer == 1.0] += 1
        gold = task.gold(example)
        if gold is None:
            without_gold += 1
            assert row["solution"] is not None
        else:
            null += row["solution"] is None
            assert reference_format("<think>" + gold) == 1.0
            assert reference_answer(gold, row["numbers"], row["target"]) == 1.0
            assert task.score(example, gold).reward == pytest.approx(1.1)
    # 15 solutions of the file do not use each number once, and only one of those problems has
    # another. The 19 that have none can all be solved.
    assert (right, without_gold, null) == ({True: 2166, False: 15}, 14, 19)


@needs_data
def test_countdown_json_as_a_task() -> None:
    task = tasks.get("countdown", path=str(DATA / "countdown.json"))
    train, test = task.examples("train"), task.examples("test")
    assert (len(train), len(test)) == (1600, 400)
    assert not {problem_of(e).key for e in train} & {problem_of(e).key for e in test}
    assert task.prompt(train[0]) == train[0].data["prompt"]
    assert str(task.prompt(train[0])).endswith("<think>")
    assert check(task, "test").passed


@needs_data
def test_gold_of_parquet_rows_scores_full_marks_and_splits_do_not_meet() -> None:
    train_path, test_path = DATA / "tinyzero_train.parquet", DATA / "tinyzero_test.parquet"
    task = tasks.get("countdown", path=str(test_path), prompt_style="plain")
    assert len(task.examples("train")) == 1600
    assert str(task.prompt(task.examples("train")[0])).endswith("<think>")
    result = check(task, "test", limit=100)
    assert result.passed
    assert not result.without_gold
    # Nearly all of the one file is in the other; none of it may be trained on.
    overlapping = tasks.get(
        "countdown",
        path=str(train_path),
        test_path=str(DATA / "countdown.json"),
        examples=10_000,
    )
    assert len(overlapping.examples("test")) == 2200
    # One more than SOURCE.txt counts: the same numbers in another order.
    assert len(overlapping.examples("train")) == 7984 - 2001
    apart = tasks.get("countdown", path=str(train_path), test_path=str(test_path), examples=10_000)
    # No row is in both as it stands, but five are in another order of their numbers.
    assert len(apart.examples("train")) == 7984 - 5


def problem_of(example: Example) -> Problem:
    return problem_from_row(example.data, example.id)


def test_generated_problems_are_solved_split_and_seeded() -> None:
    task = tasks.get("countdown", seed=3)
    train, test = task.examples("train"), task.examples("test")
    assert (len(train), len(test)) == (1600, 400)
    keys = [problem_of(e).key for e in (*train, *test)]
    assert len(set(keys)) == 2000
    assert len({e.id for e in (*train, *test)}) == 2000
    for example in (*train, *test):
        problem = problem_of(example)
        assert len(problem.numbers) in (3, 4)
        assert all(1 <= n <= 99 for n in problem.numbers)
        assert problem.target.denominator == 1
        assert 1 <= problem.target <= 100
        assert problem.solution is not None
        assert problem.solved_by(problem.solution)
    sizes = [len(key[0]) for key in keys]
    assert sizes.count(3) == sizes.count(4) == 1000
    again = tasks.get("countdown", seed=3)
    assert again.examples("train") == train
    other = tasks.get("countdown", seed=4)
    assert len({problem_of(e).key for e in other.examples("train")} & set(keys)) < 50


def test_generated_problems_stay_the_same_between_versions() -> None:
    first = tasks.get("countdown", examples=10).examples("train")[0]
    assert first.data == {"numbers": [71, 2, 12], "target": "95", "solution": "(12 * 2) + 71"}


def test_too_few_problems_to_be_had_is_said() -> None:
    task = tasks.get("countdown", max_number=2, max_target=2)
    with pytest.raises(UserError, match="different problems found with numbers up to 2"):
        task.examples("train")


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_prompts_share_all_but_their_end(style: str) -> None:
    task = tasks.get("countdown", prompt_style=style, examples=50)
    texts = []
    for example in task.examples("train"):
        prompt = task.prompt(example)
        texts.append(prompt if isinstance(prompt, str) else prompt[-1]["content"])
        problem = problem_of(example)
        tail = texts[-1][texts[-1].index("Numbers: ") :]
        assert re.findall(r"\d+", tail) == [*map(str, problem.numbers), str(problem.target)]
    shared = min(len(a) for a in texts)
    while len({text[:shared] for text in texts}) > 1:
        shared -= 1
    assert shared >= max(map(len, texts)) - 50
    assert texts[0].endswith("<think>") is (style == "plain")


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_the_check_passes(style: str) -> None:
    task = tasks.get("countdown", prompt_style=style, examples=100)
    assert check(task, "train").passed
    assert check(task, "test").passed


def test_solve_finds_what_there_is_and_nothing_else() -> None:
    assert solve(Problem((3, 8, 3, 8), Fraction(24))) == "8 / (3 - (8 / 3))"
    assert solve(Problem((5,), Fraction(5))) == "5"
    assert solve(Problem((1, 1, 1), Fraction(50))) is None
    assert solve(Problem((0, 0), Fraction(1))) is None
    rng = random.Random(1)
    for _ in range(30):
        numbers = tuple(rng.randint(1, 20) for _ in range(rng.randint(2, 4)))
        problem = Problem(numbers, Fraction(rng.randint(1, 30)))
        found = solve(problem)
        assert found is None or problem.solved_by(found)


ROWS = [
    {"context": "Reach it.\n<think>", "numbers": [44, 19, 35], "target": "98", "solution": None},
    {"prompt": "Reach it.", "nums": [98, 47, 47, 52], "target": 27.4},
    {"prompt": [{"role": "user", "content": "Go"}], "numbers": [1, 2], "target": 3},
    {"numbers": [2, 3], "target": 6, "solution": "2 + 3", "prompt": None},
    {"numbers": [35, 44, 19], "target": "98"},
]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "jsonl.gz", "parquet"])
def test_rows_of_every_format(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"rows.{suffix}"
    lines = "\n".join(map(json.dumps, ROWS))
    if suffix == "json":
        file.write_text(json.dumps(ROWS))
    elif suffix == "jsonl":
        file.write_text(lines)
    elif suffix == "jsonl.gz":
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        uniform = [
            {"nums": r.get("numbers", r.get("nums")), "target": str(r["target"])} for r in ROWS
        ]
        parquet.write_table(pyarrow.Table.from_pylist(uniform), file)
    task = tasks.get("countdown", path=str(file), test_share=0.5)
    train, test = task.examples("train"), task.examples("test")
    # The last row is the first one in another order.
    assert (len(train), len(test)) == (2, 2)
    for example in (*train, *test):
        gold = task.gold(example)
        assert gold is not None
        assert task.score(example, gold).reward == pytest.approx(1.1)
        if suffix != "parquet" and len(example.data["numbers"]) == 3:
            assert task.prompt(example) == "Reach it.\n<think>"
            assert gold.startswith("<think>") is False
        if suffix != "parquet" and example.data["target"] == "3":
            assert task.prompt(example) == [{"role": "user", "content": "Go"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"target": 3}, "`numbers` (or `nums`) is None"),
        ({"numbers": "1 2", "target": 3}, "expected a list"),
        ({"numbers": [], "target": 3}, "0 numbers"),
        ({"numbers": [1.5], "target": 3}, "number 1.5"),
        ({"numbers": [True], "target": 3}, "number True"),
        ({"numbers": [-1], "target": 3}, "number -1"),
        ({"numbers": [1]}, "target None, expected a number"),
        ({"numbers": [1], "target": "1e999999999"}, "target '1e999999999'"),
        ({"numbers": [1], "target": float("inf")}, "target inf"),
        ({"numbers": [1], "target": 1, "solution": 7}, "solution 7"),
        ({"numbers": [1], "target": 1, "prompt": 5}, "neither text nor messages"),
        ({"numbers": [1], "target": 1, "prompt": [{"role": "user"}]}, "neither text nor messages"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"numbers": [1, 2], "target": 3}) + "\n\n" + json.dumps(row))
    with pytest.raises(UserError) as raised:
        tasks.get("countdown", path=str(file)).examples("train")
    assert str(raised.value).startswith("rows.jsonl line 3: ")
    assert expected in str(raised.value)


def test_a_test_file_that_holds_all_of_train_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"numbers": [1, 2], "target": 3}))
    task = tasks.get("countdown", path=str(file), test_path=str(file))
    with pytest.raises(UserError, match="every problem of"):
        task.examples("train")
    with pytest.raises(UserError, match="1 problems cannot be split"):
        tasks.get("countdown", path=str(file)).examples("train")
