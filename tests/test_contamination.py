"""Rows that a run is evaluated on: refused, left out, or learned because the config says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from loralab import pipeline
from loralab.config import parse
from loralab.errors import UserError
from loralab.gradient.events import Remark
from loralab.run import Run

LEAK = 4
"""The training row, from 0, that is a test row too."""


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts of 15 words, none of which share two in a row but by chance."""
    return [
        {"prompt": tiny.words(15, seed + i), "completion": tiny.words(3, seed + 500 + i)}
        for i in range(count)
    ]


def write(path: Path, lines: list[dict[str, str]]) -> str:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contamination")
    tiny.model("llama").save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    train, test = rows(8, 0), rows(3, 1000)
    other = {**test[1], "completion": "another answer to it"}
    write(path / "clean.jsonl", train)
    write(path / "leaky.jsonl", [*train[:LEAK], other, *train[LEAK:]])
    write(path / "test.jsonl", test)
    write(path / "unrelated.jsonl", rows(3, 2000))
    return path


def config_for(folder: Path, name: str, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "kind": "sft",
        "name": "tiny",
        "model": str(folder / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "data": {"path": str(folder / name), "test_path": str(folder / "test.jsonl")},
        "training": {"steps": 1, "batch_size": 2, "max_length": 128},
        "evaluation": {"limit": 1},
        "generation": {"max_new_tokens": 2},
        **changes,
    }
    return parse(values, "test")


def against(folder: Path, name: str) -> list[dict[str, Any]]:
    options = {"path": str(folder / "clean.jsonl"), "test_path": str(folder / name)}
    return [{"name": "supervised", "options": options}]


def test_a_test_row_in_the_training_file_is_an_error_with_its_number(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        pipeline.start(config_for(folder, "leaky.jsonl"), tmp_path / "run", lambda event: None)
    said = str(caught.value)
    assert f"leaky.jsonl line {LEAK + 1} (example test.jsonl line 2)" in said
    assert "contamination.action=drop" in said
    assert "contamination.action=off" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "action", "trained", "left_out"),
    [("leaky.jsonl", "drop", 8, 1), ("leaky.jsonl", "off", 9, 0), ("clean.jsonl", "error", 8, 0)],
)
def test_it_is_left_out_or_learned_as_told(
    folder: Path, tmp_path: Path, name: str, action: str, trained: int, left_out: int
) -> None:
    said: list[str] = []

    def note(event: Any) -> None:
        if isinstance(event, Remark):
            said.append(event.text)

    config = config_for(folder, name, contamination={"action": action})
    _, result = pipeline.start(config, tmp_path / "run", note)
    assert result.complete
    facts = Run.open(tmp_path / "run").environment()
    assert (facts["rows"], facts["rows_contaminated"]) == (trained, left_out)
    assert any(f"leaky.jsonl line {LEAK + 1}" in text for text in said) == (action == "drop")


def test_other_tasks_test_rows_count_too(folder: Path, tmp_path: Path) -> None:
    def start(tested: str, on: str) -> None:
        config = config_for(
            folder,
            "leaky.jsonl",
            data={"path": str(folder / "leaky.jsonl"), "test_path": str(folder / tested)},
            contamination={"against": against(folder, on)},
        )
        pipeline.start(config, tmp_path / f"{tested}-{on}", lambda event: None)

    with pytest.raises(UserError, match=f"leaky.jsonl line {LEAK + 1}"):
        start("unrelated.jsonl", "test.jsonl")
    start("unrelated.jsonl", "unrelated.jsonl")


def pretraining(folder: Path, **contamination: Any) -> Any:
    values = {
        "kind": "pretrain", "name": "tiny", "dtype": "float32", "device": "cpu", "threads": 1,
        "decoder": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "num_key_value_heads": 2},
        "tokenizer": {"vocab_size": 300},
        "corpus": [{"path": str(folder / "leaky.jsonl"), "format": "pairs",
                    "test_path": str(folder / "test.jsonl")}],
        "training": {"steps": 1, "batch_size": 2, "max_length": 64},
        "contamination": contamination,
        "evaluation": {"prompts": []},
    }  # fmt: skip
    return parse(values, "test")


def test_pretraining_on_pairs_is_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"held-out rows .* leaky.jsonl line {LEAK + 1}"):
        pipeline.start(pretraining(folder), tmp_path / "a", lambda event: None)
    for action, tokens in (("drop", 8), ("off", 9)):
        config = pretraining(folder, action=action)
        _, result = pipeline.start(config, tmp_path / action, lambda event: None)
        assert result.complete, tokens


def test_a_teacher_is_not_asked_what_the_student_is_tested_on(folder: Path, tmp_path: Path) -> None:
    values = {
        "kind": "distill", "name": "tiny", "model": str(folder / "model"), "device": "cpu",
        "dtype": "float32", "threads": 1, "split": "test", "samples": 1, "min_reward": 0.0,
        "task": {"name": "supervised", "options": {
            "path": str(folder / "clean.jsonl"), "test_path": str(folder / "test.jsonl")}},
        "generation": {"max_new_tokens": 2, "temperature": 0.0},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"test\.jsonl line 1"):
        pipeline.start(parse(values, "test"), tmp_path / "a", lambda event: None)
    trained = parse({**values, "split": "train"}, "test")
    pipeline.start(trained, tmp_path / "b", lambda event: None)
    assert Run.open(tmp_path / "b").metrics()[-1]["completions"] == 8
