"""What a Trainer's loader makes of its rows: labels and padding, by collators that people use."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TrlCollator

import tiny
from loralab.health import GuardCallback
from loralab.health.training_rows import TrainingRows, training_rows
from watched_training import PROMPTS, adapted, rules_of, trainer

PAD = 0
Row = dict[str, Any]


def uneven(labels: bool = True, lengths: tuple[int, ...] = (6, 11, 8)) -> list[Row]:
    made: list[Row] = []
    for length in lengths:
        ids = [tiny.BOS, *range(5, 3 + length), tiny.EOS]
        made.append({"input_ids": ids, "attention_mask": [1] * length})
        if labels:
            made[-1]["labels"] = list(ids)
    return made


def padded(batch: list[Row], side: str = "right", masked: bool = False) -> dict[str, Any]:
    """A collator by hand. masked: padding has label -100."""
    longest = max(len(row["input_ids"]) for row in batch)

    def filled(ids: list[int], fill: int) -> list[int]:
        more = [fill] * (longest - len(ids))
        return ids + more if side == "right" else more + ids

    made = {
        "input_ids": [filled(row["input_ids"], PAD) for row in batch],
        "labels": [filled(row["input_ids"], -100 if masked else PAD) for row in batch],
    }
    return {name: torch.tensor(values) for name, values in made.items()}


def looked(rows: list[Row], collate: Any) -> TrainingRows:
    return training_rows(DataLoader(rows, batch_size=2, collate_fn=collate), 256)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("labels", [True, False])
def test_padding_that_a_collator_labels_is_seen(side: str, labels: bool) -> None:
    rows = uneven(labels)
    assert looked(rows, partial(padded, side=side)).padding_learned == 1.0
    assert looked(rows, partial(padded, side=side, masked=True)).padding_learned == 0.0


@pytest.mark.parametrize("name", ["causal", "seq2seq", "trl"])
def test_collators_of_others_do_not_learn_padding(name: str) -> None:
    tokenizer = tiny.tokenizer()
    collate: Any = {
        "causal": lambda: DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "seq2seq": lambda: DataCollatorForSeq2Seq(tokenizer),
        "trl": lambda: TrlCollator(pad_token_id=tokenizer.pad_token_id),
    }[name]()
    rows = uneven(labels=name == "seq2seq")
    before = copy.deepcopy(rows)
    found = looked(rows, collate)
    assert found.padding_learned == 0.0
    assert [len(one.input_ids) for one in found.tokens] == [6, 11, 8]
    assert rows == before, "collators pad the rows that they are given in place"


def test_nothing_is_said_where_nothing_is_padded() -> None:
    tokenizer = tiny.tokenizer()
    flat = TrlCollator(pad_token_id=tokenizer.pad_token_id, padding_free=True)
    even = uneven(lengths=(7, 7))
    assert looked(uneven(labels=False), flat).values() == {}
    assert looked(even, padded).values() == {}
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    assert looked(pairs, lambda batch: batch) == TrainingRows(1)


def test_a_guard_warns_of_it(tmp_path: Path) -> None:
    for masked, told in ((False, {"data.padding_learned"}), (True, set())):
        guard = GuardCallback(PROMPTS, every=100)
        collate = partial(padded, masked=masked)
        more: dict[str, Any] = {"data": uneven(), "data_collator": collate, "learning_rate": 1e-6}
        trainer(tmp_path / str(masked), adapted(), guard, steps=1, **more).train()
        assert guard.readings[0].values["data.padding_learned"] == float(not masked)
        assert rules_of(guard, "warn") & {"data.padding_learned"} == told
