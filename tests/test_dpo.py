"""Preference pairs read, and learned: against the formula in fp32, from every start, resumed."""

from __future__ import annotations

import gzip
import json
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

import tiny
from loralab import pipeline
from loralab.adapters import initialize
from loralab.adapters.attach import attach
from loralab.adapters.true_base import true_base
from loralab.config import AdapterConfig, TrainingConfig, parse
from loralab.config.dpo import DpoConfig, PreferenceConfig, PreferenceDataConfig
from loralab.data.sources import Row as Record
from loralab.errors import UserError
from loralab.gradient.dpo import (
    Layout,
    PairRow,
    preference,
    prepare_pairs,
    reference_of,
    train_pairs,
)
from loralab.gradient.loop import checkpoints
from loralab.gradient.preferences import Pair, Preferences, turns_of
from loralab.gradient.preferences import parse as parse_pairs
from loralab.run import Run


def human(text: str) -> str:
    return f"\n\nHuman: {text}"


def assistant(text: str) -> str:
    return f"\n\nAssistant: {text}"


def record(chosen: Any, rejected: Any, **more: Any) -> Record:
    return Record({"chosen": chosen, "rejected": rejected, **more}, "x.jsonl line 1")


def test_a_conversation_becomes_turns() -> None:
    text = human("one\n\ntwo: Human: three") + assistant("four") + human("five") + assistant("six ")
    assert turns_of(text) == [
        {"role": "user", "content": "one\n\ntwo: Human: three"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "five"},
        {"role": "assistant", "content": "six"},
    ]
    split = human("a") + assistant("b") + assistant("c")
    assert turns_of(split)[1:] == [{"role": "assistant", "content": "b\n\nc"}]
    assert turns_of("Hello" + human("a")) == []


def test_a_pair_is_two_answers_to_one_prompt_and_the_rest_is_counted() -> None:
    start = human("q") + assistant("a") + human("r")
    rows = [
        record(start + assistant("good"), start + assistant("bad")),
        record(start + assistant("same"), start + assistant("same")),
        record(start + assistant("same"), start + assistant("same ")),
        record(start + assistant("x"), human("other") + assistant("y")),
        record(start + assistant("x"), start + assistant("")),
        record(start, human("q") + assistant("b")),
        record("yes", "no", prompt="is it?"),
        record(
            [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}],
            [{"role": "user", "content": "u"}, {"role": "assistant", "content": "w"}],
        ),
    ]
    parsed = parse_pairs(rows)
    assert [(p.chosen, p.rejected) for p in parsed.pairs] == [
        ("good", "bad"), ("yes", "no"), ("v", "w")
    ]  # fmt: skip
    assert parsed.pairs[0].prompt == turns_of(start)
    assert parsed.dropped == {
        "identical": 2, "different prompts": 1, "empty answer": 1, "no last answer": 1
    }  # fmt: skip


@pytest.mark.parametrize("bad", ["no turns", 7, [], [{"role": "user"}]])
def test_what_is_no_conversation_is_named_with_its_place(bad: Any) -> None:
    with pytest.raises(UserError, match=r"x.jsonl line 1: `chosen`"):
        parse_pairs([record(bad, human("q") + assistant("a"))])


def hh_folder(path: Path) -> Path:
    """Pairs in HH-RLHF's form: the chosen answer begins with "aa", the rejected with "hh"."""
    lines = []
    for i in range(24):
        start = human(tiny.words(2 + i % 4, i)) + assistant(tiny.words(2, 500 + i))
        start += human(tiny.words(1 + i % 3, 900 + i))
        good, bad = (f"{w} {tiny.words(1 + i % 5, 99 + i)}" for w in ("aa", "hh"))
        lines.append({"chosen": start + assistant(good), "rejected": start + assistant(bad)})
    lines.append({"chosen": start + assistant("aa"), "rejected": start + assistant("aa")})
    with gzip.open(path / "pairs.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, lines)) + "\n")
    tiny.model("llama").save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hh_folder(tmp_path_factory.mktemp("dpo"))


def test_a_file_is_split_by_the_seed_and_each_pair_is_on_one_side(folder: Path) -> None:
    data = PreferenceDataConfig(path=str(folder / "pairs.jsonl.gz"), test_share=0.25)
    task = Preferences(data, 3)
    sides = [{pair.id for pair in task.pairs(split).pairs} for split in ("train", "test")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 24
    assert sum(sum(task.pairs(s).dropped.values()) for s in ("train", "test")) == 1
    example = task.examples("test")[0]
    assert task.score(example, f" {task.gold(example)}\n").reward == 1
    assert Preferences(data, 4).pairs("test") != task.pairs("test")


def some_pairs(count: int = 7) -> tuple[PairRow, ...]:
    pairs = [
        Pair(
            str(i),
            tiny.words(2 + i % 4, i),
            f"aa {tiny.words(1 + i % 5, 40 + i)}",
            f"hh {tiny.words(2 + i % 3, 80 + i)}",
        )
        for i in range(count)
    ]
    return prepare_pairs(pairs, tiny.tokenizer(), 32).rows


def model_with(
    init: str = "zero_b", seed: int = 0, moved: bool = False, kind: str = "llama"
) -> Any:
    model = attach(tiny.model(kind), AdapterConfig(rank=4, alpha=8.0), seed)
    if init != "zero_b":
        texts = [tiny.words(12, i) for i in range(8)]
        initialize(model, init, tokenizer=tiny.tokenizer(), texts=texts, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if moved and "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def answer_log_prob(model: Any, row: Any) -> torch.Tensor:
    """The plain way: one sequence, whole logits."""
    ids = torch.tensor([row.input_ids])
    log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    learned = torch.tensor(row.labels)[1:] != -100
    return log_p.gather(1, ids[0, 1:, None])[learned, 0].sum()


def plain_loss(model: Any, pairs: tuple[PairRow, ...], beta: float) -> torch.Tensor:
    losses = []
    for pair in pairs:
        now = [answer_log_prob(model, row) for row in (pair.chosen, pair.rejected)]
        with torch.no_grad(), true_base(model):
            ref = [answer_log_prob(model, row) for row in (pair.chosen, pair.rejected)]
        losses.append(-logsigmoid(beta * ((now[0] - ref[0]) - (now[1] - ref[1]))))
    return torch.stack(losses).mean()


def gradient_norm(model: Any) -> float:
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm())


@pytest.mark.parametrize("init", ["zero_b", "pissa"])
@pytest.mark.parametrize(("kind", "fast"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_the_first_step_is_that_of_the_formula(init: str, kind: str, fast: bool) -> None:
    beta, pairs = 0.3, some_pairs(5)
    settings = TrainingConfig(steps=1, batch_size=5, lr=1e-3, max_grad_norm=0.0, fast=fast)
    model = model_with(init, moved=True, kind=kind)
    plain = plain_loss(model, pairs, beta)
    plain.backward()
    norm, value = gradient_norm(model), float(plain)
    model.zero_grad()
    history = train_pairs(
        model, tiny.tokenizer(), pairs, settings, PreferenceConfig(beta=beta), 0,
        reference=reference_of(model, "base"),
    )  # fmt: skip
    assert abs(value - log(2)) > 0.01
    assert history.losses[0] == pytest.approx(value, abs=1e-5)
    assert history.grad_norms[0] == pytest.approx(norm, rel=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())


NEUTRAL = ("zero_b", "orthogonal", "pissa", "olora", "corda", "lora_ga", "eva")


@pytest.mark.parametrize("init", NEUTRAL)
def test_the_loss_of_the_first_step_is_ln_2_from_every_start_that_is_the_base(init: str) -> None:
    model = model_with(init)
    settings = TrainingConfig(steps=2, batch_size=4, lr=1e-2)
    history = train_pairs(
        model, tiny.tokenizer(), some_pairs(), settings, PreferenceConfig(), 0,
        reference=reference_of(model, "base"),
    )  # fmt: skip
    assert history.losses[0] == pytest.approx(log(2), abs=1e-4)
    assert abs(history.losses[1] - log(2)) > 1e-4


@pytest.mark.parametrize("full", [False, True])
def test_a_start_that_is_not_the_base_can_be_its_own_reference(full: bool) -> None:
    model = tiny.model("llama").requires_grad_(True) if full else model_with(moved=True)
    settings = TrainingConfig(steps=2, batch_size=4, lr=1e-2)
    start = [p.detach().clone() for p in model.parameters()]
    losses = {}
    for kind in ("base", "start"):
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.data = value.clone()
        history = train_pairs(
            model, tiny.tokenizer(), some_pairs(), settings, PreferenceConfig(beta=1.0), 0,
            reference=reference_of(model, kind),
        )  # fmt: skip
        losses[kind] = history.losses
    assert losses["start"][0] == pytest.approx(log(2), abs=1e-6)
    assert abs(losses["start"][1] - log(2)) > 1e-4
    # Trained whole, the model itself is the base.
    assert (abs(losses["base"][0] - log(2)) < 1e-6) == full


def test_smoothing_is_a_mixture_of_both_orders() -> None:
    settings = TrainingConfig(steps=1, batch_size=5, lr=1e-3)
    values = []
    swapped = tuple(PairRow(pair.rejected, pair.chosen) for pair in some_pairs(5))
    for pairs, smoothing in ((some_pairs(5), 0.0), (swapped, 0.0), (some_pairs(5), 0.2)):
        model = model_with(moved=True)
        told = PreferenceConfig(beta=1.0, label_smoothing=smoothing)
        reference = reference_of(model, "base")
        history = train_pairs(
            model, tiny.tokenizer(), pairs, settings, told, 0, reference=reference
        )
        values.append(history.losses[0])
    assert values[2] == pytest.approx(0.8 * values[0] + 0.2 * values[1], rel=1e-5)


def config_for(folder: Path, **changes: Any) -> DpoConfig:
    values: dict[str, Any] = {
        "kind": "dpo",
        "name": "tiny",
        "model": str(folder / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "data": {"path": str(folder / "pairs.jsonl.gz"), "test_share": 0.25},
        "dpo": {"beta": 0.5, "texts": 2},
        "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "training": {"steps": 12, "batch_size": 4, "lr": 2e-2, "max_length": 40, "save_every": 4},
        "evaluation": {"every": 4},
        "generation": {"max_new_tokens": 6},
        **changes,
    }
    made = parse(values, "test")
    assert isinstance(made, DpoConfig)
    return made


def without_times(run: Run) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in run.metrics()]


@pytest.mark.parametrize("init", ["zero_b", "pissa"])
def test_a_run_raises_the_held_out_margin_and_resumes_to_the_same_bits(
    folder: Path, tmp_path: Path, init: str
) -> None:
    adapter = {"rank": 4, "alpha": 8.0, "init": {"name": init}}
    config = config_for(folder, adapter=adapter)
    _, result = pipeline.start(config, tmp_path / "whole", lambda event: None)
    assert result.complete
    run = Run.open(tmp_path / "whole")
    before, *steps, after = run.metrics()
    assert before["held_out_reward"] == pytest.approx(0, abs=1e-3)
    assert after["held_out_reward"] > 0.2
    assert after["held_out_correct"] > 0.6
    assert {"margin", "accuracy", "chosen_reward", "rejected_reward"} <= steps[0].keys()
    assert steps[3]["held_out_reward"] < after["held_out_reward"]
    assert run.environment()["pairs_dropped"] == {"identical": 1, "too long": 0}
    assert [row["phase"] for row in run.completions()] == ["before"] * 2 + ["after"] * 2
    assert (run.path / "report.html").is_file()

    pipeline.start(config, tmp_path / "cut", lambda event: None)
    cut = Run.open(tmp_path / "cut")
    for newest in checkpoints(cut.checkpoints)[1:]:
        newest.rename(newest.with_name("lost"))
    pipeline.resume(tmp_path / "cut", None, lambda event: None)
    assert without_times(Run.open(tmp_path / "cut")) == without_times(run)


def test_preference_counts_a_tie_half_and_needs_no_gradient() -> None:
    model = model_with()
    layout = Layout.of(model.get_base_model(), tiny.tokenizer(), TrainingConfig(steps=1))
    found = preference(model.eval(), layout, some_pairs(), 3, 0.1, reference_of(model, "base"))
    assert found.accuracy == 0.5
    assert set(found.margins) == {0.0}
    assert not model.training
