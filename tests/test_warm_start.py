"""Starts that know something: an adapter from disk at another rank, or the model's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import tiny
from loralab.adapters import initialize
from loralab.adapters.extract import state_of
from loralab.engines.base import Completion, Request
from loralab.errors import UserError
from loralab.gradient import warm_start
from loralab.tasks.base import Example, Score, Split


def peft_model(rank: int, base: Any = None) -> PeftModel:
    config = LoraConfig(r=rank, lora_alpha=6, target_modules="all-linear")
    return get_peft_model(tiny.model("llama") if base is None else base, config)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    model = peft_model(4)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    state_of(model).save(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "logits")
    return tmp_path / "adapter"


@pytest.mark.parametrize("rank", [4, 9])
def test_an_adapter_from_disk_is_the_start_at_its_rank_or_more(rank: int, trained: Path) -> None:
    model = peft_model(rank)
    report = initialize(model, "warm_start", path=str(trained))
    expected = torch.load(trained.parent / "logits", weights_only=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert report.figures == {"energy": 1.0, "modules_at_zero": 0.0}


def test_a_lower_rank_keeps_the_most_it_can_and_says_how_much(trained: Path) -> None:
    model = peft_model(2)
    report = initialize(model, "warm_start", path=str(trained))
    assert 0.5 < report.figures["energy"] < 0.95


def test_what_does_not_fit_is_refused_before_anything_changes(trained: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(tiny.model("llama"), config)
    before = state_of(model).digest()
    with pytest.raises(UserError, match="does not target"):
        initialize(model, "warm_start", path=str(trained))
    with pytest.raises(UserError, match=r"either options\.path"):
        initialize(model, "warm_start")
    with pytest.raises(UserError, match="No such file"):
        initialize(model, "warm_start", path="nowhere")
    wide = peft_model(4, tiny.model("gpt2"))
    with pytest.raises(UserError, match="does not target"):
        initialize(wide, "warm_start", path=str(trained))
    assert state_of(model).digest() == before


class Vowels:
    """Right if an `aa` is in the completion: some of a random model's are."""

    name = "vowels"
    reward_floor = -1.0

    def examples(self, split: Split) -> Sequence[Example]:
        return [Example(str(i), {"q": f"bb c{c}"}) for i, c in enumerate("abcdefgh")]

    def prompt(self, example: Example) -> str:
        return str(example.data["q"])

    def score(self, example: Example, completion: str) -> Score:
        right = "a" in completion
        return Score(float(right), right)

    def gold(self, example: Example) -> str | None:
        return "aa"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model on disk, with the toy task behind every task name."""
    tiny.model("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(warm_start, "get", lambda name, **options: Vowels())
    from loralab.models.load import load

    return load(tmp_path, "float32")


def test_the_model_s_own_right_answers_are_kept_and_learned(base: Any) -> None:
    model, tokenizer = base
    options = {"task": "vowels", "examples": 8, "samples": 3, "steps": 12, "lr": 1e-2}
    peft = peft_model(4, model)
    report = initialize(peft, "warm_start", tokenizer=tokenizer, max_new_tokens=40, **options)
    figures = report.figures
    assert figures["sampled"] == 24
    assert 1 <= figures["kept"] <= 24
    assert 1 <= figures["solved"] <= 8
    assert figures["last_loss"] < figures["first_loss"]
    assert max(report.relative_size.values()) > 0

    again = peft_model(4, base[0])
    initialize(again, "warm_start", tokenizer=tokenizer, max_new_tokens=40, **options)
    assert state_of(again).digest() == state_of(peft).digest(), "the seed decides all of it"


def test_an_answer_that_was_cut_off_is_no_lesson(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def __init__(self, model: Any, tokenizer: Any) -> None: ...

        def generate(self, requests: Sequence[Request]) -> list[Completion]:
            ends: tuple[Any, ...] = ("stop", "length")
            return [Completion(f"aa {i}", (4, 5), ends[i % 2]) for i in range(len(requests))]

    monkeypatch.setattr(warm_start, "BatchedEngine", Engine)
    model, tokenizer = base
    options = {"task": "vowels", "samples": 3, "steps": 1}
    report = initialize(peft_model(4, model), "warm_start", tokenizer=tokenizer, **options)
    assert (report.figures["kept"], report.figures["cut"]) == (12, 12)
    monkeypatch.setattr(
        Engine, "generate", lambda self, asked: [Completion("aa", (4,), "length")] * len(asked)
    )
    with pytest.raises(UserError, match=r"24 scored without one.*raise options\.max_new_tokens"):
        initialize(peft_model(4, model), "warm_start", tokenizer=tokenizer, **options)


def test_no_right_answer_is_an_error_with_the_mend(base: Any) -> None:
    model, tokenizer = base
    with pytest.raises(UserError, match=r"none of 16 sampled .* sample more"):
        initialize(
            peft_model(4, model), "warm_start", tokenizer=tokenizer,
            task="vowels", min_reward=2.0, samples=2, max_new_tokens=4,
        )  # fmt: skip
