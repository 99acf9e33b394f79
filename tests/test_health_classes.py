"""Where the loss lies: each class against a count by hand, and what the prompt is worth."""

from __future__ import annotations

from math import isnan
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from loralab.gradient.rows import Row as TrainingRow
from loralab.health import token_classes
from loralab.health.forced import Row
from loralab.health.look import Subject
from loralab.health.prompts import Prompt
from loralab.health.token_classes import CLASSES, TokenClassProbe

OPENING = "aa bb cc dd"


def lora(size: float = 0.15) -> Any:
    model = get_peft_model(
        tiny.model("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = size if "lora_B" in name else 0.1
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model


def prompts(opening: str = "") -> list[Prompt]:
    return [
        Prompt(text=tiny.words(3 + n % 4, n), good=f"{opening} {tiny.words(4 + n % 3, 40 + n)}")
        for n in range(14)
    ]


def subject(model: Any, given: Any = None, **more: Any) -> Subject:
    return Subject(model, tiny.tokenizer(), prompts=given or prompts(), max_new_tokens=4, **more)


def kinds(seen: Subject, probe: TokenClassProbe) -> torch.Tensor:
    probe.measure(seen.look())
    classes = seen.once(probe, lambda: None)
    return classes.kind


def test_classes_share_the_whole_loss() -> None:
    seen, probe = subject(lora()), TokenClassProbe()
    seen._layout.update(dict.fromkeys(range(3, 30), True))
    got = probe.measure(seen.look())
    kind = kinds(seen, probe)
    for prefix, nll in (("loss", seen.look().good.nll), ("base.loss", seen.look().good.base_nll)):
        parts = [
            got[f"{prefix}.{name}"] * int((kind == index).sum())
            for index, name in enumerate(CLASSES)
            if (kind == index).any()
        ]
        assert sum(parts) == pytest.approx(float(nll.sum()), rel=1e-5)
    assert int((kind == CLASSES.index("eos")).sum()) == 14
    good = seen.look().good
    layout = kind == CLASSES.index("whitespace")
    assert set(good.tokens[layout].tolist()) <= set(range(3, 30))
    assert layout.any()


def test_an_opening_that_all_answers_share_is_boilerplate() -> None:
    kind = kinds(subject(lora(), prompts(OPENING)), probe := TokenClassProbe())
    del probe
    plain = kinds(subject(lora(), prompts()), TokenClassProbe())
    assert int((kind == CLASSES.index("boilerplate")).sum()) == 14 * 4
    assert int((plain == CLASSES.index("boilerplate")).sum()) == 0


def test_what_the_base_knows_after_a_strangers_prompt_is_boilerplate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_classes, "KNOWN_NATS", 3.0)
    monkeypatch.setattr(token_classes, "GAIN_ROWS", 99)
    seen, probe = subject(lora()), TokenClassProbe()
    kind = kinds(seen, probe)
    classes = seen.once(probe, lambda: None)
    known = seen.expect_base(classes.exchanged)
    inside = ~known.ends
    expected = torch.where(known.nll <= 3.0, 2, 3)[inside]
    assert torch.equal(kind[inside], expected)
    assert 0 < int((expected == 2).sum()) < len(expected)


def test_every_answer_gets_a_strangers_prompt() -> None:
    seen = subject(lora())
    import random

    made = token_classes._exchanged(seen.good_rows, random.Random(0), None)
    fronts = [row.ids[: row.start] for row in made]
    own = [row.ids[: row.start] for row in seen.good_rows]
    assert sorted(fronts) == sorted(own)
    assert all(a != b for a, b in zip(fronts, own, strict=True))
    for a, b in zip(made, seen.good_rows, strict=True):
        assert a.ids[a.start :] == b.ids[b.start :]
    short = token_classes._exchanged(seen.good_rows, random.Random(0), 9)
    assert all(len(row.ids) <= 9 for row in short)
    assert token_classes._exchanged(seen.good_rows[:1], random.Random(0), None) == []


def test_prompt_gain_is_the_difference_by_hand() -> None:
    model = lora()
    seen, probe = subject(model), TokenClassProbe()
    got = probe.measure(seen.look())
    classes = seen.once(probe, lambda: None)
    assert len(classes.exchanged) == token_classes.GAIN_ROWS
    own = {row.prompt: row for row in seen.good_rows}

    def nll(net: Any, row: Row) -> torch.Tensor:
        with torch.no_grad():
            p = net(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        at = torch.arange(row.start - 1, len(row.ids) - 1)
        return -p[at, torch.tensor(row.ids[row.start :])][:-1]

    for prefix, net in (("", model.get_base_model()), ("base.", tiny.model("llama"))):
        other = torch.cat([nll(net, row) for row in classes.exchanged])
        same = torch.cat([nll(net, own[row.prompt]) for row in classes.exchanged])
        expected = float((other - same).mean())
        assert got[f"{prefix}loss.prompt_gain"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert abs(expected) > 1e-3


def test_one_prompt_for_all_is_worth_nothing() -> None:
    given = [Prompt(text="ab cd ef", good=tiny.words(5, n)) for n in range(6)]
    got = TokenClassProbe().measure(subject(lora(), given).look())
    assert got["loss.prompt_gain"] == pytest.approx(0, abs=1e-5)


def test_zero_b_loses_what_its_base_loses() -> None:
    got = TokenClassProbe().measure(subject(lora(size=0.0)).look())
    for name in ("eos", "content", "prompt_gain"):
        assert got[f"loss.{name}"] == pytest.approx(got[f"base.loss.{name}"], rel=1e-5), name
    moved = TokenClassProbe().measure(subject(lora()).look())
    assert moved["loss.content"] != pytest.approx(moved["base.loss.content"], rel=1e-3)


def test_classes_stay_while_the_model_moves() -> None:
    model = lora()
    seen, probe = subject(model), TokenClassProbe()
    first = probe.measure(seen.look())
    kept = seen.once(probe, lambda: None)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(2)
    second = probe.measure(seen.look())
    assert seen.once(probe, lambda: None) is kept
    assert second["base.loss.content"] == first["base.loss.content"]
    assert second["loss.content"] != first["loss.content"]


def training_rows(count: int = 5) -> list[TrainingRow]:
    """Three tokens of prompt, then what is learned, a hole in the middle, the end token."""
    generator = torch.Generator().manual_seed(8)
    made = []
    for _ in range(count):
        ids = [tiny.BOS, *torch.randint(4, 60, (10,), generator=generator).tolist(), tiny.EOS]
        labels = [-100] * 4 + ids[4:6] + [-100, -100] + ids[8:]
        made.append(TrainingRow(tuple(ids), tuple(labels)))
    return made


def test_training_rows_count_where_they_are_labelled() -> None:
    model = lora()
    rows = training_rows()
    seen, probe = subject(model), TokenClassProbe(rows)
    got = probe.measure(seen.look())
    losses = []
    for row in rows:
        with torch.no_grad():
            p = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        losses.append(
            [-float(p[at - 1, row.input_ids[at]]) for at in range(1, 12) if row.labels[at] != -100]
        )
    content = [loss for row in losses for loss in row[:-1]]
    assert got["loss.content"] == pytest.approx(sum(content) / len(content), rel=1e-4)
    assert got["loss.eos"] == pytest.approx(sum(row[-1] for row in losses) / 5, rel=1e-4)
    assert isnan(got["loss.whitespace"])
    assert got["base.loss.content"] != pytest.approx(got["loss.content"], rel=1e-3)


def test_some_rows_are_drawn_by_the_seed() -> None:
    rows = training_rows(40)

    def chosen(seed: int) -> list[int]:
        seen, probe = subject(lora(), seed=seed), TokenClassProbe(rows, limit=6)
        probe.measure(seen.look())
        return [row.prompt for row in seen.once((probe, "rows"), lambda: None).rows]

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)
    assert len(chosen(0)) == 6


def test_rows_without_labels_are_left_out_and_cut_ones_have_no_end() -> None:
    ids = tuple(range(4, 16))
    rows = [
        TrainingRow(ids, (-100,) * 12),
        TrainingRow(ids, (-100,) * 5 + ids[5:]),
    ]
    seen, probe = subject(lora()), TokenClassProbe(rows)
    got = probe.measure(seen.look())
    assert isnan(got["loss.eos"])
    assert isnan(got["loss.prompt_gain"])
    assert got["loss.content"] > 0


def test_without_a_base_the_model_itself_sorts() -> None:
    got = TokenClassProbe().measure(subject(tiny.model("llama")).look())
    assert not [name for name in got if name.startswith("base.")]
    assert got["loss.content"] > 0
