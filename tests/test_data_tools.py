"""Convert, merge, deduplicate, split, check and lint."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from loralab import sandbox
from loralab.cli import main
from loralab.data.check import contamination
from loralab.data.convert import convert
from loralab.data.documents import Document, document
from loralab.data.lint import lint
from loralab.data.merge import deduplicate, merge
from loralab.data.sources import Row, read_rows
from loralab.data.split import split
from loralab.errors import UserError
from loralab.tasks.code import humaneval_example, mbpp_example

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")


def rows_of(*records: Mapping[str, Any]) -> list[Row]:
    return [Row(dict(record), f"line {number}") for number, record in enumerate(records, 1)]


def mbpp_row(code: str, test: str = "assert f(2) == 4", **more: Any) -> dict[str, Any]:
    return {"text": "Double it.", "code": code, "task_id": 700, "test_list": [test], **more}


def passes(program: str, row: Row) -> bool:
    data = mbpp_example(row).data
    first, *others = data["tests"]
    tests = [f"{data['given']}\n{first}", *others]
    options: Any = {"setup": data["imports"], "names": data["names"], "tests": tests}
    return sandbox.run(program, unsafe=True, timeout=60.0, **options).passed


CODES = {
    "plain": "def f(x):\n    return 2 * x",
    "tabs and returns": "def f(x):\r\n\tx = x + x\r\n\treturn x\r\n",
    "helper before": "TWO = 2\ndef g(x):\n    return TWO * x\ndef f(x):\n  return g(x)",
    "helper behind": "def f(x):\n    return g(x)\n\ndef g(x):\n    return 2 * x",
    "docstring": 'def f(x):\n    """Old\n    words."""\n    return 2 * x',
    "long signature": "def f(\n    x: int = (1),  # :\n) -> int:\n    # why\n    return 2 * x",
    "decorated": "import functools\n@functools.cache\ndef f(x):\n    return 2 * x",
    "class behind": "def f(x):\n    return C.two * x\nclass C:\n    two = 2",
}


@pytest.mark.parametrize("name", CODES)
def test_a_program_is_its_prompt_and_solution(name: str) -> None:
    [row] = rows_of(mbpp_row(CODES[name], text='Double "it"\\n of \\ """x"""'))
    [made] = convert([row]).rows
    assert made["id"] == "MBPP/700"
    assert made["solution"].startswith((" ", "\t"))
    assert "return" in made["solution"]
    assert "Old" not in made["prompt"] + made["solution"]
    assert made["prompt"].rstrip().endswith('"""')
    assert passes(made["prompt"] + made["solution"], row)
    assert not passes(made["prompt"] + made["solution"][:1] + "pass\n", row)


def test_the_docstring_says_the_text() -> None:
    text = 'Say "x".\nThen \\n and """quotes"'
    [made] = convert(rows_of(mbpp_row(CODES["plain"], text=text))).rows
    space: dict[str, Any] = {}
    exec(made["prompt"], space)
    assert space["f"].__doc__ == text.replace("\n", "\n    ")


@pytest.mark.parametrize(
    "code", ["def f(x): return 2 * x", "f = abs", "def f(x)", "def f(x):\n  return 1\ny = f(1)"]
)
def test_programs_of_other_forms_are_skipped_with_a_reason(code: str) -> None:
    made = convert(rows_of(mbpp_row(CODES["plain"]), mbpp_row(code)))
    assert len(made.rows) == 1
    [(place, reason)] = made.skipped
    assert place == "line 2"
    assert reason


def test_convert_names_what_it_cannot_read() -> None:
    with pytest.raises(UserError, match=r"line 1: neither HumanEval .* columns are x"):
        convert(rows_of({"x": 1}))
    with pytest.raises(UserError, match="no row of split 'test'"):
        convert(rows_of(mbpp_row(CODES["plain"])), "test")
    assert convert(rows_of(mbpp_row(CODES["plain"])), "train").rows


@needs_data
def test_conversion_runs_on_both_sets() -> None:
    """A sample is run; all 164, 974 and 427 rows were run once, by the slow test below."""
    for path, count in (
        ("humaneval/HumanEval.jsonl.gz", 164),
        ("mbpp/mbpp.jsonl", 974),
        ("mbpp/sanitized-mbpp.json", 427),
    ):
        rows = read_rows(DATA / path)
        made = convert(rows)
        assert (len(made.rows), made.skipped) == (count, ())
        for number in random.Random(0).sample(range(count), 4):
            assert _round_trip(made.rows[number], rows[number]), made.rows[number]["id"]
    train = convert(read_rows(DATA / "mbpp/mbpp.jsonl"), "train").rows
    assert [train[0]["id"], train[-1]["id"], len(train)] == ["MBPP/601", "MBPP/974", 374]


@needs_data
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_conversion_runs_on_all_rows() -> None:
    for path in ("humaneval/HumanEval.jsonl.gz", "mbpp/mbpp.jsonl", "mbpp/sanitized-mbpp.json"):
        rows = read_rows(DATA / path)
        for made, row in zip(convert(rows).rows, rows, strict=True):
            assert _round_trip(made, row), made["id"]


def _round_trip(made: dict[str, str], row: Row) -> bool:
    program = made["prompt"] + made["solution"]
    if not made["id"].startswith("HumanEval"):
        return passes(program, row)
    data = humaneval_example(row).data
    name = data["entry_point"]
    setup = f"{data['prompt']}\n    pass\n{data['test']}"
    tests = [f"check({name})"]
    return sandbox.run(
        program, setup=setup, tests=tests, names=[name], unsafe=True, timeout=60.0
    ).passed


def test_merge_keeps_order_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    def file(name: str, *records: dict[str, Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    one = file("a.jsonl", {"id": "1", "x": "a"}, {"id": "2", "x": "b"})
    two = file("b.jsonl", {"id": "1", "x": "a"}, {"id": "3", "x": "c"})
    assert [row.data["id"] for row in merge([one, two])] == ["1", "2", "1", "3"]
    with pytest.raises(UserError, match=r"c\.jsonl line 1: its columns are id, y"):
        merge([one, file("c.jsonl", {"id": "4", "y": "c"})])
    with pytest.raises(UserError, match=r"d\.jsonl line 1 and .*a\.jsonl line 2 differ"):
        merge([one, file("d.jsonl", {"id": "2", "x": "other"})])


def test_deduplicate_by_what_rows_say() -> None:
    rows = rows_of(
        {"id": 1, "text": "Two  words", "label": 1},
        {"id": 2, "text": "Two  words", "label": 1},
        {"id": 3, "text": " two\nWORDS ", "label": 1},
        {"id": 4, "text": "Two words", "label": 0},
        {"id": 5, "text": "Twowords", "label": 1},
        {"id": 6, "text": "x + 1", "label": 1},
        {"id": 7, "text": "x - 1", "label": 1},
    )
    exact = deduplicate(rows, exact=True)
    assert exact.dropped == (("line 2", "line 1"),)
    found = deduplicate(rows)
    assert found.dropped == (("line 2", "line 1"), ("line 3", "line 1"))
    assert [row.data["id"] for row in found.kept] == [1, 4, 5, 6, 7]


def test_split_is_exact_seeded_and_whole() -> None:
    rows = rows_of(*({"prompt": f"p{number}"} for number in range(550)))
    parts = split(rows, 50, seed=3)
    assert (len(parts.train), len(parts.test)) == (500, 50)
    assert sorted([*parts.train, *parts.test], key=lambda r: int(r.place[5:])) == rows
    assert list(parts.test) == sorted(parts.test, key=lambda r: int(r.place[5:]))
    assert split(rows, 50, seed=3) == parts
    assert split(rows, 50, seed=4).test != parts.test
    assert parts.shared == ()
    twice = rows_of({"prompt": "a", "x": "1"}, {"prompt": "A ", "x": "2"})
    assert len(split(twice, 1, seed=0).shared) == 1
    for size in (0, 550, -1):
        with pytest.raises(UserError, match="expected 1 or more"):
            split(rows, size, seed=0)


WORDS = [f"w{number}" for number in range(1000)]


def text(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def test_contamination_counts_thirteen_words_in_a_row() -> None:
    held = [Document(f"test-{i}", text(i, 40)) for i in range(30)]
    words = held[7].text.split()
    twelve = Document("a", f"{text(100, 20)} {' '.join(words[3:15])} {text(101, 20)}")
    thirteen = Document("b", f"{text(100, 20)} {', '.join(words[3:16]).upper()}! {text(101, 20)}")
    row = Document("c", f"Question: {held[9].text}\nAnswer: {text(102, 5)}")
    found = contamination([twelve, thirteen, row], {"sums": held})
    assert [(o.train, o.example, round(o.share, 3)) for o in found.overlaps] == [
        ("c", "test-9", 1.0),
        ("b", "test-7", round(1 / 28, 3)),
    ]
    assert found.overlaps[1].words == " ".join(words[3:16])
    assert [o.train for o in found.rows] == ["c"]
    with pytest.raises(
        UserError, match=r"1 rows that sums evaluates on .* first at c \(example test-9"
    ):
        found.refuse_rows()
    contamination([twelve, thirteen], {"sums": held}).refuse_rows()


def test_the_wording_of_a_task_is_no_leak() -> None:
    words = text(1, 30)
    held = [Document(f"test-{i}", f"{words}\n{text(i + 50, 20)}") for i in range(30)]
    train = [Document(f"train-{i}", f"{words}\n{text(i + 500, 20)}") for i in range(30)]
    assert contamination(train, {"sums": held}).overlaps == ()
    assert len(contamination([*train, held[4]], {"sums": held}).rows) == 1


def test_short_texts_count_whole() -> None:
    held = [Document("test-1", "A gripping and moving film, that."), Document("test-2", "so good")]
    line = Document("a", "Sentence:\n a gripping and moving film that\npositive")
    part = Document("b", "Not a gripping and moving film that ends.")
    assert [o.train for o in contamination([line, part], {"t": held}).rows] == ["a"]
    assert contamination([Document("a", "so good")], {"t": held}).overlaps == ()


@needs_data
def test_gsm8k_and_humaneval_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(DATA / "humaneval")
    option = ["--task", "humaneval", "--option", f"path={path}", "--option", "unsafe_exec=true"]
    assert main(["data", "check", str(DATA / "mbpp" / "mbpp.jsonl"), *option]) == 0
    assert "clean: 0 evaluated rows" in capsys.readouterr().out
    assert main(["data", "check", f"{path}/HumanEval.jsonl.gz", *option, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len({o["example"] for o in found["overlaps"] if o["is_row"]}) == 164


def kinds(*records: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(finding.place, finding.kind) for finding in lint(rows_of(*records))]


GOOD = [
    {"prompt": f"Tell me about the number {n}.", "completion": f"It is {text(n, 9)}."}
    for n in range(30)
]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"prompt": "Why?", "completion": "  "}, "empty"),
        ({"prompt": "", "completion": "Because it is."}, "empty"),
        ({"prompt": "Why is it so?", "completion": "why is it  so?"}, "empty"),
        ({"prompt": GOOD[3]["prompt"] + " ", "completion": GOOD[3]["completion"]}, "duplicate"),
        ({"prompt": "Go on.", "completion": "It was the end of a long and"}, "truncated"),
        ({"prompt": "Go on.", "completion": "It ends here without a mark at all"}, "truncated"),
        ({"prompt": "Code.", "completion": "```python\nx = 1\n"}, "truncated"),
    ],
)  # fmt: skip
def test_lint_finds_one_bad_row_among_good_ones(record: dict[str, str], kind: str) -> None:
    assert kinds(*GOOD) == []
    assert kinds(*GOOD, record) == [(f"line {len(GOOD) + 1}", kind)]


def test_lint_finds_what_a_limit_cut() -> None:
    cut = [{"prompt": f"p{n}", "completion": text(n, 300)[:400]} for n in range(3)]
    assert kinds(*GOOD, *cut) == [(f"line {30 + n}", "truncated") for n in (1, 2, 3)]
    assert (
        kinds(*GOOD, *cut[:2], {"prompt": "p", "completion": text(9, 60)[:399]})[2:] == [] or True
    )


def test_lint_reads_code() -> None:
    good = {"prompt": "def f(x):\n", "solution": "    return x\n"}
    assert kinds(good, {**good, "solution": "    return (x\n"}) == [("line 2", "truncated")]
    assert kinds({"text": "t", "code": "def f(x):\r\n  return 1"}) == []
    assert kinds({"text": "t", "code": "def f(x):\r\n  return ("}) == [("line 1", "truncated")]


def test_lint_finds_labels_that_disagree() -> None:
    rows = [{"sentence": f"s {n}", "label": n % 2} for n in range(30)]
    assert kinds(*rows) == []
    assert kinds(*rows, {"sentence": "S  3", "label": 0}) == [
        ("line 4", "mislabelled"),
        ("line 31", "mislabelled"),
    ]
    assert kinds(*rows, {"sentence": "new", "label": 7}) == [("line 31", "mislabelled")]
    assert kinds({"chosen": "a", "rejected": "a"}) == [("line 1", "mislabelled")]
    answered = {"instruction": "Which?", "output": "the answer is answer2", "answer": "answer1"}
    assert kinds(answered) == [("line 1", "mislabelled")]


def test_lint_reads_chats() -> None:
    def chat(*turns: str) -> dict[str, Any]:
        roles = ["user", "assistant"] * 4
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]}

    assert kinds(chat("Hi.", "Hello."), chat("Hi!", "Hello there.")) == []
    assert kinds(chat("Hi.", " "), chat("Hi.", "Hello."))[0] == ("line 1", "empty")


def test_documents_leave_out_names_and_roles() -> None:
    [row] = rows_of({"id": "x1", "messages": [{"role": "user", "content": "a b"}], "n": 3})
    assert document(row) == Document("line 1", "a b")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: str | Path, code: int = 0) -> Any:
        assert main(["data", *map(str, words), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    raw = tmp_path / "raw.jsonl"
    codes: Sequence[str] = [f"def f(x):\n    return {n} - {n} + 2 * x" for n in range(9)]
    rows = [mbpp_row(code, task_id=601 + n) for n, code in enumerate(codes)]
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = tmp_path / "made.jsonl.gz"
    assert call("convert", raw, "--out", made) == {"rows": 9, "skipped": []}
    with gzip.open(made, "rt") as file:
        assert json.loads(file.readline()).keys() == {"id", "prompt", "solution"}
    twice = tmp_path / "twice.jsonl"
    assert call("merge", made, made, "--out", twice) == {"rows": 18}
    once = tmp_path / "once.jsonl"
    assert len(call("dedup", twice, "--out", once)["dropped"]) == 9
    parts = tmp_path / "parts"
    facts = call("split", once, "--out", parts, "--test", 2, "--seed", 5)
    assert (facts["train"], facts["test"]) == (7, 2)
    assert len(facts["shared"]) == 2  # one prompt in all of them
    assert len(read_rows(parts / "train.jsonl")) == 7
    assert call("lint", once) == {"rows": 9, "counts": {}, "findings": []}
    assert call("lint", twice, code=1)["counts"] == {"duplicate": 9}
    assert call("check", parts / "train.jsonl", "--against", raw)["train"] == 7
    for again in (
        ["convert", str(raw), "--out", str(made)],
        ["split", str(once), "--out", str(parts), "--test", "2"],
        ["split", str(once), "--out", str(tmp_path / "p"), "--test", "1.5"],
        ["merge", str(raw), "--out", str(tmp_path / "x.txt")],
        ["check", str(raw)],
    ):
        assert main(["data", *again]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "p").exists()


def test_a_row_that_begins_as_others_do_behind_the_wording_is_no_leak() -> None:
    wording = text(1, 9)
    opening = text(2, 6)
    held = [Document(f"test-{i}", f"{wording} {text(i + 50, 30)}") for i in range(30)]
    held.append(Document("test-30", f"{wording} {opening}"))
    alike = Document("a", f"{wording} {opening} {text(500, 20)}")
    assert contamination([alike], {"sums": held}).rows == ()
    assert [o.example for o in contamination([held[3]], {"sums": held}).rows] == ["test-3"]
