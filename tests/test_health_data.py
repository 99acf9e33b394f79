"""Rows as a trainer sees them, each fault beside rows that do not have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import starts
import tiny
from loralab.data.documents import Document
from loralab.health.data import (
    IGNORED,
    DataProbe,
    Tokens,
    base_values,
    ends_of,
    foreign_template,
    row_facts,
    tokens_of,
    tokens_of_batch,
)


def row(prompt: Sequence[int], answer: Sequence[int], end: bool = True) -> Tokens:
    after = (*answer, tiny.EOS) if end else tuple(answer)
    return Tokens((*prompt, *after), (IGNORED,) * len(prompt) + after)


def healthy(count: int = 12, seed: int = 0) -> list[Tokens]:
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> list[int]:
        return torch.randint(4, tiny.VOCABULARY, (size,), generator=generator).tolist()

    return [row([tiny.BOS, *draw(6)], draw(9)) for _ in range(count)]


def facts(rows: Sequence[Tokens], **options: Any) -> dict[str, float]:
    made = tiny.tokenizer()
    return dict(row_facts(rows, made, ends_of(made), **options).values)


FAULTS = ("all_masked", "eos_missing", "pad_is_eos_masked", "double_bos", "truncated")


def test_healthy_rows_have_nothing() -> None:
    values = facts(healthy(), max_length=64)
    assert values["data.rows"] == 12
    for name in (*FAULTS, "duplicate_share", "template_mismatch", "newline_share"):
        assert values[f"data.{name}"] == 0.0, name
    assert values["data.top_token_share"] <= 0.15


def test_masked_rows_and_missing_ends() -> None:
    rows = healthy()
    masked = [Tokens(r.input_ids, (IGNORED,) * len(r.labels)) for r in rows[:3]]
    # A label on the first token alone teaches nothing.
    masked.append(Tokens((7, 8), (7, IGNORED)))
    endless = [row([tiny.BOS, 5, 6], [7, 8, 9], end=False)]
    values = facts([*rows[:3], *masked, *endless, endless[0]])
    assert values["data.all_masked"] == pytest.approx(4 / 9)
    assert values["data.eos_missing"] == pytest.approx(2 / 5)
    assert values["data.pad_is_eos_masked"] == 0.0
    assert values["data.duplicate_share"] == pytest.approx(1 / 9)


def test_an_end_masked_as_padding_is_told_from_one_that_is_not_there() -> None:
    made = tiny.tokenizer()
    made.pad_token = made.eos_token
    rows = [
        Tokens(r.input_ids, tuple(IGNORED if t == tiny.EOS else t for t in r.labels))
        for r in healthy()
    ]
    values = dict(row_facts(rows, made, ends_of(made)).values)
    assert (values["data.eos_missing"], values["data.pad_is_eos_masked"]) == (1.0, 1.0)
    other = dict(row_facts(rows, tiny.tokenizer(), {tiny.EOS}).values)
    assert (other["data.eos_missing"], other["data.pad_is_eos_masked"]) == (1.0, 0.0)
    sound = dict(row_facts(healthy(), made, ends_of(made)).values)
    assert (sound["data.eos_missing"], sound["data.pad_is_eos_masked"]) == (0.0, 0.0)


def test_a_row_cut_at_its_length_is_not_one_without_an_end() -> None:
    cut = [Tokens(r.input_ids[:10], r.labels[:10]) for r in healthy()]
    values = facts(cut, max_length=10)
    assert (values["data.truncated"], values["data.eos_missing"]) == (1.0, 0.0)
    assert facts(cut)["data.eos_missing"] == 1.0


def test_double_bos_and_a_token_too_many() -> None:
    double = [row([tiny.BOS, tiny.BOS, 5], [7, 7, 7, 7, 8]) for _ in range(2)]
    found = row_facts(double, tiny.tokenizer(), {tiny.EOS})
    assert found.values["data.double_bos"] == 1.0
    assert found.values["data.top_token_share"] == pytest.approx(4 / 6)
    assert found.top_token == tiny.tokenizer().decode([7])


class Breaks:
    """A tokenizer of which every third token is a line break."""

    bos_token_id, eos_token_id, pad_token_id, chat_template = None, 1, 2, None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("\n\n" if i % 3 == 0 else " \n" if i == 50 else f"w{i}" for i in ids)

    def get_added_vocab(self) -> dict[str, int]:
        return {}


def test_line_breaks_are_counted_among_learned_tokens_alone() -> None:
    rows = [Tokens((3, 6, 4, 9, 50, 1), (IGNORED, IGNORED, 4, 9, 50, 1))]
    assert row_facts(rows, Breaks(), {1}).values["data.newline_share"] == 0.5


def test_marks_of_another_template() -> None:
    made = tiny.tokenizer()
    assert foreign_template("[INST] hi [/INST]", made) == "Llama 2"
    assert foreign_template("ASSISTANT: hi", made) is None
    assert foreign_template("USER: a ASSISTANT: hi", made) == "Vicuna"
    made.chat_template = "{% for m in messages %}[INST]{{ m['content'] }}{% endfor %}"
    assert foreign_template("[INST] hi [/INST]", made) is None
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    assert foreign_template("<|im_start|>user", made) is None
    assert foreign_template("<start_of_turn>user", made) == "Gemma"


def test_tokens_of_every_kind_of_row() -> None:
    wanted = [Tokens((5, 6, 7), (IGNORED, 6, 7)), Tokens((8, 9), (IGNORED, 9))]
    assert list(tokens_of(wanted)) == wanted
    assert list(tokens_of([{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}])) == wanted[:1]
    assert next(tokens_of([{"input_ids": [5, 6, 7]}])).labels == (5, 6, 7)
    packed = {
        "input_ids": [5, 6, 7, 8, 9],
        "labels": [IGNORED, 6, 7, IGNORED, 9],
        "seq_lengths": [3, 2],
    }
    assert list(tokens_of([packed])) == wanted
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [1, 8, 9]]),
        "labels": torch.tensor([[IGNORED, 6, 7], [IGNORED, IGNORED, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
    }
    assert list(tokens_of_batch(batch)) == wanted


def learned_pairs(model: Any, count: int = 16) -> list[Tokens]:
    """Answers that the model itself gives: likely behind their own prompts alone."""
    rows = []
    for prompted in healthy(count, seed=3):
        prompt = list(prompted.input_ids[:7])
        with torch.no_grad():
            out = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, 7, dtype=torch.long),
                do_sample=False,
                max_new_tokens=8,
                eos_token_id=None,
            )
        rows.append(row(prompt, out[0, 7:].tolist()))
    return rows


def test_shuffled_answers_are_told_by_the_base() -> None:
    model = tiny.model("llama")
    pairs = learned_pairs(model)
    own, _ = base_values(model, pairs)
    assert own["data.shuffled"] <= 0.1
    assert own["data.pair_gain"] > 5 * own["data.pair_gain.se"]
    order = [*range(1, len(pairs)), 0]
    shuffled = [row(pairs[i].input_ids[:7], pairs[j].input_ids[7:-1]) for i, j in enumerate(order)]
    crossed, _ = base_values(model, shuffled)
    assert 0.2 < crossed["data.shuffled"] < 0.8
    assert abs(crossed["data.pair_gain"]) < 4 * crossed["data.pair_gain.se"]


def test_a_token_that_the_base_does_not_expect() -> None:
    model = tiny.model("llama")
    expected, _ = base_values(model, learned_pairs(model))
    stuffed = [row(r.input_ids[:7], [*r.input_ids[7:10], 33, 33, 33]) for r in healthy(16)]
    values, token = base_values(model, stuffed)
    assert token == 33
    assert values["data.excess_token"] > 0.35 > expected["data.excess_token"]


def test_looking_is_of_the_base_repeats_and_changes_nothing() -> None:
    bare = base_values(tiny.model("llama"), learned_pairs(tiny.model("llama")))
    model = starts.peft_model()
    starts.start(model, "pissa")
    starts.shake(model)
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    kept, rng = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    rows = learned_pairs(tiny.model("llama"))
    found = base_values(model, rows)
    assert found == bare
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wants
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(kept[n], t) for n, t in model.state_dict().items())


def test_too_few_rows_or_none_with_a_prompt_are_not_judged() -> None:
    model = tiny.model("llama")
    assert base_values(model, healthy(3)) == ({}, None)
    text = [Tokens(r.input_ids, r.input_ids) for r in healthy()]
    assert base_values(model, text) == ({}, None)
    assert facts([]) == {"data.rows": 0.0}


def test_the_probe_tells_all_once() -> None:
    words = " ".join(f"word{i}" for i in range(30))
    probe = DataProbe(
        healthy(),
        tiny.tokenizer(),
        max_length=64,
        passes=3.0,
        documents=[Document("a", words), Document("b", "something else altogether")],
        evaluated={"task": [Document("1", words)]},
    )
    values = probe.measure_model(tiny.model("llama"))
    assert values["data.passes"] == 3.0
    assert values["data.contaminated"] == 0.5
    assert "data.shuffled" in values
    assert probe.facts is not None
    assert probe.facts.places == ("a",)
    assert probe.measure_model(None) == values
    without = DataProbe(healthy(), tiny.tokenizer()).measure_model(None)
    assert "data.shuffled" not in without
    assert "data.contaminated" not in without
