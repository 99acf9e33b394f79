"""Multiple choice: the last label answers, and naming the options is no answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from loralab import tasks
from loralab.errors import UserError
from loralab.tasks.check import check
from loralab.tasks.choice import NAMES, Choice, last_label

DATA = Path(__file__).parents[2] / "shared" / "data" / "commonsense"
FOUR = ("answer1", "answer2", "answer3", "answer4")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("the correct answer is answer3", "answer3"),
        ("answer1 looks right, but the correct answer is answer3.", "answer3"),
        ("Answer2", "answer2"),
        ("**Answer2**", "answer2"),
        ("Answer3: it grows faster", "answer3"),
        ("answer1 is wrong. answer2 is wrong. answer4 is it", "answer4"),
        ("answer9", "answer9"),
        ("the answer is answer12", "answer12"),
        ("answer1, answer1", "answer1"),
        ("", None),
        ("the correct answer is answer", None),
        ("answer1/answer2/answer3/answer4", None),
        ("answer1, answer2, answer3 or answer4", None),
        ("- answer1\n- answer2\n- answer3\n- answer4", None),
        ("Answer1: red Answer2: blue Answer3: green Answer4: grey", None),
        ("Answer1: red Answer2: blue\n\nthe correct answer is answer2", "answer2"),
        ("myanswer1", None),
    ],
)
def test_last_label(text: str, label: str | None) -> None:
    assert last_label(text, FOUR) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [("it is not false but true", "true"), ("true/false", None), ("true or false", None),
     ("False.", "false"), ("untrue", None)],
)  # fmt: skip
def test_true_or_false(text: str, label: str | None) -> None:
    assert last_label(text, ("true", "false")) == label


def test_reading_is_bounded_in_time() -> None:
    assert last_label("answer1 " + "/ " * 100_000 + "answer2", FOUR) is None


def row(number: int) -> dict[str, str]:
    return {
        "instruction": f"Please choose: question {number}?\n\nAnswer1: a Answer2: b\n\n"
        "Answer format: answer1/answer2",
        "input": "",
        "output": f"the correct answer is answer{1 + number % 2}",
        "answer": f"answer{1 + number % 2}",
    }


def test_a_set_with_one_file_is_split_by_the_seed_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "test.json").write_text(json.dumps([row(i) for i in range(10)]))
    task = Choice(dataset="piqa", path=str(tmp_path), test_share=0.3)
    with caplog.at_level(logging.WARNING):
        train, test = task.examples("train"), task.examples("test")
    assert (len(train), len(test)) == (7, 3)
    assert "do not compare with published ones" in caplog.text
    texts = [e.data["instruction"] for e in [*train, *test]]
    assert sorted(texts) == sorted(row(i)["instruction"] for i in range(10))
    again = Choice(dataset="piqa", path=str(tmp_path / "piqa"), test_share=0.3)
    assert again.examples("test") == test
    other = Choice(dataset="piqa", path=str(tmp_path), test_share=0.3, seed=1)
    assert other.examples("test") != test
    assert check(task, "train").passed


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="option dataset is 'riddles'"):
        tasks.get("choice", dataset="riddles", path=str(tmp_path))
    (tmp_path / "test.json").write_text(json.dumps([{**row(0), "answer": "answer7"}] * 2))
    with pytest.raises(UserError, match=r"test\.json row \d: answer 'answer7' is not in"):
        tasks.get("choice", dataset="piqa", path=str(tmp_path)).examples("test")


@pytest.mark.skipif(not DATA.is_dir(), reason="no commonsense sets beside the project")
@pytest.mark.parametrize("name", NAMES)
def test_every_real_gold_answer_scores_and_no_non_answer_does(name: str) -> None:
    task = Choice(dataset=name, path=str(DATA))  # type: ignore[arg-type]
    result = check(task, "test", 400)
    assert result.passed
    assert not result.without_gold
    for example in task.examples("test")[:100]:
        labels = example.data["labels"]
        assert len(labels) >= 2
        for listed in ("/".join(labels), ", ".join(labels), " or ".join(labels)):
            assert not task.score(example, listed).correct
        wrong = next(label for label in labels if label != example.data["answer"])
        assert task.score(example, f"{wrong}? no: {example.data['answer']}").correct
        assert not task.score(example, f"{example.data['answer']}? no: {wrong}").correct
