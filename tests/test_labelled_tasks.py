"""SST-2, SAMSum and plain text: what counts as an answer, and numbers against references."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

import tiny
from loralab import tasks
from loralab.adapters.state import AdapterState
from loralab.engines.likelihood import likelihood
from loralab.errors import UserError
from loralab.tasks.base import Continuous, Labelled, Measured
from loralab.tasks.check import check
from loralab.tasks.metrics import classification

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture
def sst2(tmp_path: Path) -> Path:
    head = "sentence\tlabel\n"
    words = ("dull", "warm", "flat", "fine", "bad", "good")
    train = [f'a "{word}" film \t{i % 2}' for i, word in enumerate(words)]
    with gzip.open(tmp_path / "train.tsv.gz", "wt") as file:
        file.write(head + "\n".join(train) + "\n")
    (tmp_path / "test-labeled.tsv").write_text(f"{head}not positive at all \t0\nit 's fun .\t1\n")
    return tmp_path


def test_sentiment_reads_tables_and_scores_the_class_that_is_named(sst2: Path) -> None:
    task: Any = tasks.get("sst2", path=str(sst2))
    assert isinstance(task, Labelled)
    assert isinstance(task, Measured)
    negative, positive = task.examples("test")
    assert (task.text(negative), task.label(negative)) == ("not positive at all", 0)
    assert task.text(task.examples("train")[0]) == 'a "dull" film'

    def answer(text: str) -> tuple[bool | None, float]:
        score = task.score(positive, text)
        return score.correct, score.parts["answered"]

    assert answer(" Positive.") == (True, 1.0)
    assert answer("\n\nThe review is **positive**.\nNegative reviews are rare.") == (True, 1.0)
    assert answer("negative") == (False, 1.0)
    for nothing in ("positive or negative", "nonnegative", "", "It is neither.", "positively"):
        assert answer(nothing) == (False, 0.0)
    # Whatever a copied prompt names, shots and the sentence's own words too, is no answer.
    shown: Any = tasks.get("sst2", path=str(sst2), shots=4, style="plain")
    for example in shown.examples("test"):
        assert not shown.score(example, shown.prompt(example)).correct
        assert shown.score(example, shown.prompt(example) + shown.gold(example)).correct
        assert shown.score(example, f"{shown.gold(example)}\n\nReview: x\nSentiment: no").correct


def test_a_short_sentence_does_not_cut_the_answer(tmp_path: Path) -> None:
    rows = [
        {"sentence": "it", "label": 1},
        {"sentence": "negative", "label": 0},
        {"sentence": "never positive", "label": 0},
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    task: Any = tasks.get("sst2", path=str(tmp_path))
    for example, right in zip(task.examples("test"), ("positive", *["negative"] * 2), strict=True):
        assert task.score(example, right).correct
        assert task.score(example, f'"{right}"').correct
        assert task.score(example, f'"{task.text(example)}" is {right}').correct
        assert task.score(example, f"Review: {task.text(example)}\nSentiment: {right}").correct
        assert not task.score(example, f"Review: {task.text(example)}").parts["answered"]


def test_shots_are_balanced_fixed_and_never_the_example(sst2: Path) -> None:
    task: Any = tasks.get("sst2", path=str(sst2), shots=4, style="plain")
    for example in [*task.examples("test"), *task.examples("train")]:
        prompt = task.prompt(example)
        assert prompt.count("Review: ") == 5
        assert prompt.count(f"Review: {task.text(example)}") == 1
        if example in task.examples("test"):
            assert prompt.count("Sentiment: positive") == prompt.count("Sentiment: negative") == 2
        assert prompt == tasks.get("sst2", path=str(sst2), shots=4, style="plain").prompt(example)


def test_accuracy_and_f1_by_hand() -> None:
    # TP 2, FN 1, FP 1, TN 1, one without an answer.
    found = classification([1, 1, 0, 1, 0, None], [1, 1, 1, 0, 0, 0])
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["f1_macro"] == pytest.approx((4 / 6 + 2 * 1 / (2 * 1 + 1 + 2)) / 2)
    assert classification([0, None], [1, 1]) == {"accuracy": 0.0, "f1": 0.0, "f1_macro": 0.0}
    with pytest.raises(UserError, match="no examples"):
        classification([], [])


@pytest.mark.parametrize("label", ["-1", "2", "", None])
def test_a_sentence_without_a_label_is_an_error(tmp_path: Path, label: str | None) -> None:
    for split in ("train", "test"):
        row = {"sentence": "x", "label": label}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"test\.jsonl line 1: `label`"):
        tasks.get("sst2", path=str(tmp_path)).examples("test")


def test_a_table_with_a_broken_line_is_an_error(sst2: Path) -> None:
    (sst2 / "test-labeled.tsv").write_text("sentence\tlabel\nx\t1\ny\n")
    with pytest.raises(UserError, match="line 3 has 1 values"):
        tasks.get("sst2", path=str(sst2)).examples("test")


@pytest.fixture
def samsum(tmp_path: Path) -> Path:
    rows = [
        {"dialogue": f"Ann: are you coming at {i}?\r\nBob: yes", "summary": f"Bob comes at {i}."}
        for i in range(6)
    ]
    (tmp_path / "train.json").write_text(json.dumps([*rows, {"dialogue": "", "summary": "x"}]))
    (tmp_path / "test.json").write_text(json.dumps(rows[:2]))
    return tmp_path


def test_summaries_are_scored_as_rouge_score_scores_them(samsum: Path) -> None:
    task: Any = tasks.get("samsum", path=str(samsum))
    assert len(task.examples("train")) == 6
    first, second = task.examples("test")
    answered = [(first, "Bob is coming at 0, says Ann"), (second, "Ann comes")]
    assert "\r" not in first.data["dialogue"]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    means = dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.0)
    for example, text in answered:
        wanted = scorer.score(example.data["summary"], text)
        score = task.score(example, text)
        assert score.parts == {kind: wanted[kind].fmeasure for kind in means}
        assert score.reward == score.parts["rougeL"] > 0
        assert score.correct is None
        means = {kind: means[kind] + wanted[kind].fmeasure / 2 for kind in means}
    assert task.metrics(answered) == pytest.approx(means)
    assert task.score(first, "Bob comes at 0.\n\nDialogue:\nAnn: and you?").reward == 1.0


def test_shots_of_summaries(samsum: Path) -> None:
    task: Any = tasks.get("samsum", path=str(samsum), shots=2, style="plain")
    for example in [*task.examples("test"), *task.examples("train")]:
        prompt = task.prompt(example)
        assert prompt.count("Dialogue:") == 3
        assert prompt.endswith(f"{example.data['dialogue']}\n\nSummary:")
    assert check(task, "test").passed


def test_text_is_cut_into_passages(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(25)]
    (tmp_path / "test.txt").write_text(" ".join(words) + "\n \n" + "too short\n")
    task: Any = tasks.get("text", path=str(tmp_path), words=8)
    assert isinstance(task, Continuous)
    first, *_ = task.examples("test")
    assert len(task.examples("test")) == 3
    assert (task.prompt(first), task.gold(first)) == ("w0 w1 w2 w3", " w4 w5 w6 w7")
    assert task.score(first, " w4 w5 x w7").reward == 0.5
    assert check(task, "test").passed


@pytest.mark.parametrize("name", ["sst2", "samsum", "text"])
def test_the_published_sets(name: str) -> None:
    folder = SHARED / {"text": "wikitext-2"}.get(name, name)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    task = tasks.get(name, path=str(folder))
    for split in ("train", "test"):
        assert check(task, split, 100).passed
    sizes = {"sst2": (67349, 1821), "samsum": (14731, 819)}
    if name in sizes:
        assert (len(task.examples("train")), len(task.examples("test"))) == sizes[name]


@torch.no_grad()
def by_hand(model: Any, ids: list[int]) -> float:
    logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return -sum(float(logits[i, token]) for i, token in enumerate(ids[1:]))


@pytest.mark.parametrize("with_adapter", [False, True])
def test_perplexity_is_that_of_the_whole_text_where_it_fits(with_adapter: bool) -> None:
    model, tokenizer, text = tiny.model("llama"), tiny.tokenizer(), tiny.words(40, 1)
    adapter: AdapterState | None = tiny.adapter(model, 3) if with_adapter else None
    found = likelihood(model, tokenizer, text, adapter, context=64)
    if adapter is not None:
        for name, (a, b) in adapter.factors.items():
            model.get_submodule(name).weight.data += adapter.scaling * b @ a
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tiny.BOS
    assert found.tokens == len(ids) - 1 == 40
    assert found.nats == pytest.approx(by_hand(model, ids), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.nats / 40))


def test_a_window_that_slides_predicts_every_token_once() -> None:
    model, tokenizer, text = tiny.model("llama"), tiny.tokenizer(), tiny.words(40, 1)
    ids = tokenizer(text)["input_ids"]
    found = likelihood(model, tokenizer, text, context=16, stride=6)
    nats, done = by_hand(model, ids[:16]), 16
    while done < len(ids):
        end = min(len(ids), done + 6)
        window = ids[end - 16 : end]
        nats += by_hand(model, window) - by_hand(model, window[: 16 - (end - done)])
        done = end
    assert found.tokens == 40
    assert found.nats == pytest.approx(nats, rel=1e-4)
    with pytest.raises(UserError, match="two tokens"):
        likelihood(model, tokenizer, "")
