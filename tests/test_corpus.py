"""Documents, tokens and rows of pretraining: nothing lost, nothing learned that should not be."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import tiny
from loralab.config.pretrain import SourceConfig
from loralab.errors import UserError
from loralab.gradient.corpus import Document, read_corpus
from loralab.gradient.rows import IGNORED
from loralab.gradient.stream import Mixture, TextRows, rows_of, shuffled, token_counts
from loralab.gradient.tokenizer import BOS, EOS, train_tokenizer

TEXTS = [
    f"{tiny.words(3 + i % 11, i)}.\nIt was {i}, d\u00e9j\u00e0 vu \u2014 \u4f60\u597d!"
    for i in range(60)
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300, context=64)


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, f"document {i}") for i, text in enumerate(texts)]


def texts_of(found: tuple[Document, ...]) -> list[str]:
    return [document.text for document in found]


def test_files_folders_and_archives_become_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\r\ntwo<|sep|>\n\nthree\n<|sep|>  \n<|sep|>four")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt.gz").write_bytes(gzip.compress(b"five<|sep|>six"))
    (tmp_path / "c.py").write_text("print(7)\n")
    [source] = read_corpus([SourceConfig(path=str(tmp_path), separator="<|sep|>", test_share=0.0)])
    assert texts_of(source.train) == ["one\ntwo", "three", "four", "five", "six"]
    assert [d.place for d in source.train][1] == "a.txt document 2"
    [code] = read_corpus([SourceConfig(path=str(tmp_path), suffixes=(".py",), test_share=0.0)])
    assert texts_of(code.train) == ["print(7)"]
    [first] = read_corpus(
        [SourceConfig(path=str(tmp_path), separator="<|sep|>", limit=3, test_share=0.0)]
    )
    assert len(first.train) == 3
    rows = [{"text": "eins"}, {"text": "zwei"}, {"text": " "}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    [given] = read_corpus([SourceConfig(path=str(tmp_path / "rows.jsonl"), test_share=0.0)])
    assert texts_of(given.train) == ["eins", "zwei"]


def test_what_is_held_out_is_the_end_and_is_learned_from_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("##".join(f"story {i}" for i in range(20)))
    (tmp_path / "b.txt").write_text("##".join(["story 19", "another", " story 19\n", "third"]))
    a = SourceConfig(path=str(tmp_path / "a.txt"), separator="##", test_share=0.1)
    b = SourceConfig(path=str(tmp_path / "b.txt"), separator="##", test_share=0.0)
    first, second = read_corpus([a, b])
    assert texts_of(first.test) == ["story 18", "story 19"]
    assert texts_of(first.train) == [f"story {i}" for i in range(18)]
    assert texts_of(second.train) == ["another", "third"]
    assert (first.repeated, second.repeated) == (0, 2)
    held = SourceConfig(path=a.path, separator="##", test_path=b.path)
    [given] = read_corpus([held])
    assert (len(given.train), len(given.test), given.repeated) == (19, 4, 1)


def test_a_single_document_is_cut_at_the_end_of_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    [source] = read_corpus([SourceConfig(path=str(tmp_path / "a.txt"), test_share=0.2)])
    [train], [test] = source.train, source.test
    assert train.text + test.text == text.strip("\n")
    assert test.text.startswith("line ")
    assert 0.15 < len(test.text) / len(text) < 0.25


@pytest.mark.parametrize(
    ("files", "changes", "match"),
    [
        ({}, {}, "no such file or folder"),
        ({"a.md": "x"}, {"path": "."}, "no file that ends in .txt"),
        ({"a.txt": " \n"}, {}, "holds no text"),
        ({"a.txt": "x##y"}, {"separator": "##", "test_share": 0.9}, "cannot be split"),
        ({"a.txt": b"\xff\xfe\x00"}, {}, "not UTF-8"),
        ({"a.txt.gz": b"plain"}, {"path": "a.txt.gz"}, "cannot be read"),
        ({"a.jsonl": '{"text": 3}'}, {"path": "a.jsonl"}, "`text` is 3"),
        ({"a.jsonl": '{"prompt": "x"}'}, {"path": "a.jsonl", "format": "pairs"}, "completion"),
    ],
)
def test_what_cannot_be_read_is_said(
    files: dict[str, Any], changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    path = str(tmp_path / changes.pop("path", "a.txt"))
    with pytest.raises(UserError, match=match) as caught:
        read_corpus([SourceConfig(path=path, **changes)])
    assert "\n" not in str(caught.value)


def test_the_tokenizer_says_any_text_and_is_made_again_the_same(tmp_path: Path) -> None:
    first, second = (train_tokenizer(TEXTS, 300, 64) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 300
    first.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    strange = "\x00 \u00dcber\t\u4f60 \U0001f600\n\n  ha he"
    ids = again(strange)["input_ids"]
    assert ids == first(strange)["input_ids"]
    assert ids[0] == again.bos_token_id
    assert again.decode(ids, skip_special_tokens=True) == strange
    assert (again.bos_token, again.eos_token) == (BOS, EOS)
    assert len(again(TEXTS[0])["input_ids"]) < len(TEXTS[0].encode())


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=8),
    length=st.integers(2, 20),
    packed=st.booleans(),
)
def test_rows_hold_every_token_once_and_keep_the_borders(
    texts: list[str], length: int, packed: bool
) -> None:
    tokenizer = _shared()
    rows = TextRows(documents(texts), tokenizer, length, packed)
    whole = [
        [
            tokenizer.bos_token_id,
            *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
            tokenizer.eos_token_id,
        ]
        for text in texts
    ]
    seen = [row.input_ids for row in rows]
    assert token_counts(rows) == (sum(map(len, seen)), sum(row.learned for row in rows))
    assert token_counts(rows) == token_counts(list(rows))
    assert all(1 < len(ids) <= length for ids in seen)
    sequences = []
    for row in rows:
        assert sum(row.sequences) == len(row.input_ids)
        assert row.labels == row.input_ids
        at = 0
        for size in row.sequences:
            sequences.append(row.input_ids[at : at + size])
            at += size
    # A document alone in its rows: its pieces, end to end, less lone last tokens.
    lost = sum(map(len, whole)) - sum(map(len, sequences))
    assert lost <= (1 if packed else len(texts))
    if packed:
        flat = [token for ids in seen for token in ids]
        assert flat == [token for ids in whole for token in ids][: len(flat)]
        assert all(len(ids) == length for ids in seen[:-1])
    starts = sum(ids[0] == tokenizer.bos_token_id for ids in sequences)
    assert starts >= len(texts) - 1
    assert all(tokenizer.bos_token_id not in ids[1:] for ids in sequences)
    assert all(tokenizer.eos_token_id not in ids[:-1] for ids in sequences)


_MADE: list[Any] = []


def _shared() -> Any:
    if not _MADE:
        _MADE.append(train_tokenizer(TEXTS, 300, 64))
    return _MADE[0]


def test_special_tokens_that_a_text_spells_out_are_its_letters(tokenizer: Any) -> None:
    rows = TextRows(documents([f"before {EOS} after {BOS}"]), tokenizer, 64, packed=True)
    ids = rows[0].input_ids
    assert Counter(ids)[tokenizer.eos_token_id] == 1
    assert tokenizer.decode(ids[1:-1]) == f"before {EOS} after {BOS}"


def test_of_pairs_the_solution_alone_is_learned(tokenizer: Any, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Add {i} and 1: ", "solution": f"it is {i + 1}"} for i in range(9)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    [source] = read_corpus(
        [SourceConfig(path=str(tmp_path / "p.jsonl"), format="pairs", test_share=0.0)]
    )
    for packed in (False, True):
        rows = rows_of(source, source.train, tokenizer, 64, packed)
        learned = [
            [t for t, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED]
            for row in rows
        ]
        text = "".join(tokenizer.decode(ids) for ids in learned)
        assert text == "".join(f"it is {i + 1}{EOS}" for i in range(9))
        assert (len(rows) < 9) == packed
    said: list[str] = []
    whole = rows_of(source, source.train, tokenizer, 64, False, said.append)
    assert not said
    longest = max(len(row.input_ids) for row in whole)
    over = sum(len(row.input_ids) == longest for row in whole)
    rows_of(source, source.train, tokenizer, longest - 1, True, said.append)
    assert f"{over} of 9 pairs" in said[0]
    assert "end token included" in said[0]
    with pytest.raises(UserError, match=r"row 1 \(p.jsonl line 1\) has nothing to learn"):
        rows_of(source, source.train, tokenizer, 3, packed=False)


def test_a_mixture_shows_its_sources_by_weight(tokenizer: Any) -> None:
    one = TextRows(documents(["a b c"] * 30), tokenizer, 64, packed=False)
    two = TextRows(documents(["d e f"] * 10), tokenizer, 64, packed=False)
    plain = Mixture([one, two], [None, None])
    assert len(plain) == 40
    even = Mixture([one, two], [1.0, 1.0])
    firsts = Counter(even.row(i).input_ids for i in range(len(even)))
    assert sorted(firsts.values()) == [20, 20]
    record = even[39]
    assert record["input_ids"] == list(two[9].input_ids)
    assert record["seq_lengths"] == [len(two[9].input_ids)]
    mixed = shuffled(documents(TEXTS), seed=3)
    assert mixed != documents(TEXTS)
    assert sorted(d.text for d in mixed) == sorted(TEXTS)
    assert mixed == shuffled(documents(TEXTS), seed=3)
    with pytest.raises(UserError, match="no row"):
        Mixture([[]], [None])
