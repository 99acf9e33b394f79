"""Rows as a trainer sees them, each fault beside rows that do not have it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import Any

import pytest
import torch

import starts
import tiny
from loralab.data.documents import Document
from loralab.health.data import (
    DataProbe,
    Tokens,
    base_values,
    ends_of,
    foreign_template,
    row_facts,
    tokens_of,
    tokens_of_batch,
)
from loralab.health.look import Subject
from loralab.health.pairs import IGNORED, pairs_of
from loralab.health.reading import Reading
from loralab.health.rules import causes, judge


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
    for name in (
        *FAULTS,
        "blank",
        "empty",
        "duplicate_share",
        "template_mismatch",
        "newline_share",
    ):
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


def test_answers_that_cannot_be_seen() -> None:
    breaks = Tokens((4, 9, 50, 1), (IGNORED, 9, 50, 1))
    nothing = Tokens((4, 5, 1), (IGNORED, IGNORED, 1))
    text = Tokens((4, 5, 9, 1), (IGNORED, 5, 9, 1))
    values = row_facts([breaks, nothing, text, text], Breaks(), {1}).values
    assert (values["data.blank"], values["data.empty"]) == (0.25, 0.25)
    # In tokens the line breaks are few: a break of any length may be one.
    assert values["data.newline_share"] < 0.5


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


def read(model: Any, rows: Sequence[Tokens]) -> dict[str, float]:
    made = pairs_of(rows, {tiny.EOS})
    assert made is not None
    return base_values(model, made)[0]


def test_shuffled_answers_are_told_by_the_base() -> None:
    model = tiny.model("llama")
    pairs = learned_pairs(model)
    own = read(model, pairs)
    assert own["data.shuffled"] <= 0.1
    assert own["data.pair_gain"] > 5 * own["data.pair_gain.se"]
    order = [*range(1, len(pairs)), 0]
    shuffled = [row(pairs[i].input_ids[:7], pairs[j].input_ids[7:-1]) for i, j in enumerate(order)]
    crossed = read(model, shuffled)
    assert 0.2 < crossed["data.shuffled"] < 0.8
    assert abs(crossed["data.pair_gain.errors"]) < 4 < own["data.pair_gain.errors"]


def test_a_class_is_exchanged_with_another_class_alone() -> None:
    """Half of the rows share their answer: behind each other's prompts it is as likely by right."""
    model = tiny.model("llama")
    pairs = learned_pairs(model)
    answers = [pairs[0].input_ids[7:-1], pairs[1].input_ids[7:-1]]
    rows = [row(p.input_ids[:7], answers[at % 2]) for at, p in enumerate(pairs)]
    made = pairs_of(rows)
    assert made is not None
    own = dict(made.own)
    assert len(made.crossed) == len(rows)
    assert all(own[prompt] != answer for prompt, answer in made.crossed)
    assert pairs_of([row(p.input_ids[:7], answers[0]) for p in pairs]) is None


def test_what_the_model_has_learned_of_the_rows_is_measured_anew() -> None:
    model = starts.peft_model()
    pairs = learned_pairs(tiny.model("llama"))
    order = [*range(1, len(pairs)), 0]
    rows = [row(pairs[i].input_ids[:7], pairs[j].input_ids[7:-1]) for i, j in enumerate(order)]
    probe = DataProbe(rows, tiny.tokenizer())
    look = Subject(model, tiny.tokenizer(), prompts=["a"]).look()
    first = probe.measure(look)
    assert first["data.row_loss"] == pytest.approx(first["base.data.row_loss"])
    assert first["data.learned_gain"] == pytest.approx(first["data.pair_gain"], abs=1e-5)
    learn(model, rows)
    then = probe.measure(look)
    assert then["data.pair_gain"] == first["data.pair_gain"], "the base's stays"
    assert then["data.learned_gain.errors"] > 3 > first["data.learned_gain.errors"]
    assert then["data.row_loss"] < first["data.row_loss"] - 0.3
    assert "data.rescaled_loss" not in then


def test_an_adapter_at_another_scale_than_it_learned_at_shows() -> None:
    model = starts.peft_model()
    rows = healthy(16)
    learn(model, rows)
    probe = DataProbe(rows, tiny.tokenizer())
    look = Subject(model, tiny.tokenizer(), prompts=["a"]).look()
    before = probe.measure(look)
    layers = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    for layer in layers:
        layer.scaling["default"] *= 8
    values = probe.measure(look)
    assert values["data.row_loss"] > values["base.data.row_loss"]
    assert values["data.rescaled_loss"] == pytest.approx(before["data.row_loss"], abs=1e-3)
    findings = judge([Reading(0, values, (), 0.0)])
    assert causes(findings)[0] == "scale.wrong"
    assert "scale.rows" in [one.rule for one in findings]
    assert all(layer.scaling["default"] == 8 * 2.0 for layer in layers), "put back as it was"


def test_a_model_whose_numbers_are_none_is_not_judged_by_its_rows() -> None:
    model = starts.peft_model()
    probe = DataProbe(healthy(16), tiny.tokenizer())
    for value in (float("nan"), float("inf")):
        next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = value
        values = probe.measure(Subject(model, tiny.tokenizer(), prompts=["a"]).look())
        assert isnan(values["data.learned_gain.errors"])
        assert isnan(values["data.overexpected"])
        assert not any(one.rule.startswith("data.") for one in judge([Reading(9, values, (), 0)]))


def test_a_token_that_counts_fifty_times_is_expected_too_often() -> None:
    rows = healthy(96)
    values = {}
    for weight in (1.0, 50.0):
        torch.manual_seed(0)
        model = starts.peft_model()
        learn(model, rows, {rows[0].input_ids[9]: weight}, steps=4)
        probe = DataProbe(rows, tiny.tokenizer())
        values[weight] = probe.measure(Subject(model, tiny.tokenizer(), prompts=["a"]).look())
    rise = {w: v["data.overexpected"] - v["base.data.overexpected"] for w, v in values.items()}
    assert rise[50.0] > 0.04 > 0.01 > rise[1.0]


def learn(
    model: Any, rows: Sequence[Tokens], weights: dict[int, float] | None = None, steps: int = 60
) -> None:
    """By heart."""
    weighing = torch.ones(tiny.VOCABULARY)
    for token, weight in (weights or {}).items():
        weighing[token] = weight
    longest = max(len(one.input_ids) for one in rows)
    ids = torch.tensor([[*r.input_ids, *[tiny.PAD] * (longest - len(r.input_ids))] for r in rows])
    labels = torch.tensor([[*r.labels, *[IGNORED] * (longest - len(r.labels))] for r in rows])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    for _ in range(steps):
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(
            logits, labels[:, 1:].flatten(), weight=weighing, ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_token_that_the_base_does_not_expect() -> None:
    model = tiny.model("llama")
    expected = read(model, learned_pairs(model))
    stuffed = [row(r.input_ids[:7], [*r.input_ids[7:10], 33, 33, 33]) for r in healthy(16)]
    made = pairs_of(stuffed)
    assert made is not None
    values, token = base_values(model, made)
    assert token == 33
    assert values["data.excess_token"] > 0.35 > expected["data.excess_token"]
    short = [row(r.input_ids[:7], r.input_ids[7:8]) for r in healthy(16)]
    told = DataProbe(short, tiny.tokenizer()).measure_model(model)
    assert told["data.excess_token"] < 0.3, "every other token is an end, by right"


def test_looking_is_of_the_base_repeats_and_changes_nothing() -> None:
    bare = read(tiny.model("llama"), learned_pairs(tiny.model("llama")))
    model = starts.peft_model()
    starts.start(model, "pissa")
    starts.shake(model)
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    kept, rng = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    rows = learned_pairs(tiny.model("llama"))
    probe = DataProbe(rows, tiny.tokenizer())
    looked = probe.measure(Subject(model, tiny.tokenizer(), prompts=["a"]).look())
    assert bare.items() <= looked.items()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wants
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(kept[n], t) for n, t in model.state_dict().items())


def test_too_few_rows_or_none_with_a_prompt_are_not_judged() -> None:
    assert pairs_of(healthy(3)) is None
    text = [Tokens(r.input_ids, r.input_ids) for r in healthy()]
    assert pairs_of(text) is None
    told = DataProbe(text, tiny.tokenizer()).measure_model(tiny.model("llama"))
    assert "data.shuffled" not in told
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
