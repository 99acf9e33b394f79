"""Rows from paths: every format gives the same rows, every error names its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from loralab.data.sources import iter_rows, read_rows
from loralab.errors import UserError

# U+2028 and U+0085 end a line for str.splitlines, but not in JSONL.
ROWS = [{"text": "a\u2028b\u0085c"}, {"text": "é", "n": 2}, {"text": "last"}]


def write(tmp_path: Path, name: str) -> Path:
    file = tmp_path / name
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
    if name.endswith(".jsonl"):
        file.write_text(lines, encoding="utf-8")
    elif name.endswith(".gz"):
        file.write_bytes(gzip.compress(lines.encode()))
    elif name == "lines.json":
        file.write_text(lines, encoding="utf-8-sig")
    elif name == "crlf.json":
        file.write_bytes(("\ufeff" + json.dumps(ROWS, indent=2)).replace("\n", "\r\n").encode())
    else:
        file.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.json.gz", "lines.json", "crlf.json", "A.JSON"]
)
def test_each_text_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = read_rows(write(tmp_path, name))
    assert [row.data for row in rows] == ROWS
    array = name in ("a.json", "crlf.json", "A.JSON")
    assert rows[1].place == f"{name} {'row' if array else 'line'} 2"


def test_parquet_and_its_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"nums": [1, 2], "target": 3, "large": "x"}, {"nums": [], "target": None, "large": "y"}]
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert [row.data for row in read_rows(file)] == rows
    assert read_rows(file)[1].place == "a.parquet row 2"
    narrow = read_rows(file, columns=("target", "nums", "absent"))
    assert narrow[0].data == {"nums": [1, 2], "target": 3}


def test_a_folder_is_its_files_in_order_of_name(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl")
    write(tmp_path, "a.json")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    (tmp_path / "inner.jsonl").mkdir()
    places = [row.place for row in read_rows(tmp_path)]
    assert places == [f"a.json row {n}" for n in (1, 2, 3)] + [
        f"b.jsonl line {n}" for n in (1, 2, 3)
    ]


def test_rows_come_one_at_a_time_but_the_path_is_checked_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\nbroken\n')
    assert next(iter_rows(file)).data == {"n": 1}
    with pytest.raises(UserError, match="no such file"):
        iter_rows(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            b'{"n": 1}\n\n{"n": }\n',
            "a.jsonl line 3 is not JSON: Expecting value at column 7",
        ),
        ("a.jsonl", b'{"n": 1}\n[1]\n', "a.jsonl line 2 is list, expected an object"),
        ("a.jsonl", b'{"n": 1}\n{"t": "\xff"}\n', "a.jsonl line 2 is not UTF-8 text: byte 8"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.json", b"", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'[{"n": 1},\n {"n": ]', "a.json line 2 is not JSON: Expecting value"),
        ("a.json", b'[{"n": 1}, 2]', "a.json row 2 is int, expected an object"),
        ("a.jsonl", b"[" * 200_000, "nested too deep"),
        (
            "a.jsonl",
            b'{"n": ' + b"1" * 10_000 + b"}",
            "a.jsonl line 1 is not JSON that can be read",
        ),
        ("a.jsonl.gz", b"plain text", "Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"n": 1}\n' * 9999)[:-20], "cannot be read after line"),
        ("a.parquet", b"not parquet", "cannot be read as Parquet"),
        ("a.txt", b"text", "a.txt is not a data file: expected .json"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_place(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_rows(file)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder: .*absent\.json"):
        read_rows(tmp_path / "absent.json")
    with pytest.raises(UserError, match="holds no data file"):
        read_rows(tmp_path)
