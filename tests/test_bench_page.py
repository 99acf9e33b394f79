"""Benchmarks' pages and command lines: what people wrote survives what a command writes."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from loralab.bench import command
from loralab.bench.table import BEGIN, END, Section, Table, around
from loralab.errors import UserError

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [*sorted(DOCS.glob("bench-*.md")), DOCS / "initialisation.md"]


def table(speed: float) -> Table:
    section = Section("Speed", "", ["way", "tokens/s", "x"], [["a|b", speed, None]], ["A note."])
    return Table("Title", {"machine": "one"}, [section], {"n": speed}, {"page.png": b"figure"})


def test_page_json_and_figure_are_written_together(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    table(1234.5).write(page)
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n\n- machine: one\n\n## Speed\n\n| way |")
    assert text.endswith(f"| a\\|b | 1234 | - |\n\nA note.\n\n{END}\n")
    assert json.loads(page.with_suffix(".json").read_text())["n"] == 1234.5
    assert page.with_name("page.png").read_bytes() == b"figure"
    assert sorted(p.name for p in page.parent.iterdir()) == ["page.json", "page.md", "page.png"]
    table(9.0).write(page)
    assert page.read_text() == text.replace("1234", "9")


def test_what_people_wrote_around_it_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    mine = "# My title\n\nWhy.\n\n", "\n## Against what was asked\n\nI measured  4.04 x.\n"
    page.write_text(f"{mine[0]}{BEGIN}\nold numbers\n{END}\n{mine[1]}")
    for speed in (7.0, 8.0):
        table(speed).write(page)
    assert page.read_text() == f"{mine[0]}{BEGIN}\n\n{table(8.0).measured()}\n{END}\n{mine[1]}"
    page.write_text("# By hand\n\nNo marks.\n")
    table(7.0).write(page)
    assert page.read_text().startswith(f"# By hand\n\nNo marks.\n\n{BEGIN}\n\n- machine: one\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_published_page_has_its_marks(page: Path, tmp_path: Path) -> None:
    copy = tmp_path / page.name
    copy.write_text(page.read_text())
    before, after = around(copy)
    assert before.count("\n# ") + before.startswith("# ") == 1
    assert BEGIN in page.read_text()
    table(7.0).write(copy)
    assert around(copy) == (before, after)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="loralab bench none")
    made.add_argument("--quick", action="store_true")
    made.add_argument("--rows", nargs="+")
    made.add_argument("--laps", type=int)
    made.add_argument("--out", type=Path)
    made.add_argument("--json", type=Path)
    made.add_argument("--peak-of")
    return made


def test_a_command_measures_then_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[command.Given] = []

    def run(given: command.Given, say: command.Say) -> Table:
        seen.append(given)
        say("at it")
        return table(7.0)

    def main(*words: str) -> int:
        quick = {"laps": 1, "rows": ()}
        return command.main(parser(), words, Path("page.md"), run, quick, lambda row, _: 1.5)

    Path("file").touch()
    assert main("--rows", "a", "/b/c", "--json=file/raw.json") == 2
    assert "cannot write file/raw.json" in capsys.readouterr().err
    Path("file").unlink()
    assert main("--quick", "--rows", "a") == 0
    assert seen == [{"rows": ("a", "/b/c")}, {"laps": 1, "rows": ("a",)}]
    assert not list(tmp_path.iterdir())
    assert main("--rows", "a", "/b/c") == 0
    out, err = capsys.readouterr()
    assert err == "at it\n" * 2
    assert "- command: `loralab bench none --rows a c`\n- machine: one\n" in out
    assert "- command: `loralab bench none --rows a c`" in Path("page.md").read_text()
    assert main("--quick", "--out", "other.md") == 0
    assert Path("other.md").exists()
    assert main("--peak-of", "a") == 0
    assert capsys.readouterr().out.endswith('{"peak_gb": 1.5}\n')
    assert len(seen) == 4


@pytest.mark.parametrize("text", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"])
def test_marks_that_are_no_pair_are_said_before_anything_is_measured(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)

    def run(*_: object) -> Table:
        raise AssertionError("hours of measuring")

    assert command.main(parser(), [], page, run) == 2
    assert "page.md: the marks around the measured part are" in capsys.readouterr().err
    assert page.read_text() == text


def test_paths_of_a_machine_are_cut() -> None:
    words = ["--data", "/x/gsm8k", "--y=/x/z.txt", "../shared/a", "<|end|>", "/", "a=b"]
    assert [command.told(word) for word in words] == [
        "--data", "gsm8k", "--y=z.txt", "../shared/a", "<|end|>", "/", "a=b",
    ]  # fmt: skip


@dataclass(frozen=True)
class Counts:
    laps: int = 1
    batch_size: int = 1
    core: int | None = 0
    quick: bool = False
    share: float = 0.0


def test_counts() -> None:
    command.check_counts(Counts())
    command.check_counts(Counts(laps=0), zero=("laps",))
    for wrong, said in (
        (Counts(laps=0), "--laps is 0; expected 1 or more"),
        (Counts(batch_size=-2), "--batch-size is -2; expected 1 or more"),
        (Counts(core=-1), "--core is -1; expected 0 or more"),
    ):
        with pytest.raises(UserError, match=said):
            command.check_counts(wrong)
