"""The scaling rises from 0 to its target, under any Trainer, and is saved as it was used."""

from __future__ import annotations

import copy
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiny
from loralab.adapters.extract import state_of
from loralab.adapters.inits import initialize
from loralab.adapters.inits.progressive import KL, ProgressiveScaling, callback_for
from loralab.errors import UserError

TEXTS = ["aa bb cc dd ee ff gg hh", "ab cd ef gh ba dc fe hg", "ha gb fc ed aa bb", "hh gg ff"]


def model(**options: Any) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    made = get_peft_model(tiny.model("llama"), config)
    initialize(made, "progressive", tokenizer=tiny.tokenizer(), texts=TEXTS, **options)
    return made


def scaling(of: PeftModel) -> float:
    return float(of.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"])


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(4, tiny.VOCABULARY, (9,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def train(of: PeftModel, steps: int, folder: Path, **options: Any) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy=options.pop("save_strategy", "no"),
        save_steps=options.pop("save_steps", 500),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    callback = callback_for(of)
    assert callback is not None
    callbacks = [callback, *options.pop("more", ())]
    trainer = Trainer(of, arguments, train_dataset=Rows(), callbacks=callbacks)
    trainer.train(**options)
    return trainer


def test_shapes_of_the_rise() -> None:
    made = model(shape="cosine", steps=8)
    schedule = callback_for(made).schedule  # type: ignore[union-attr]
    assert scaling(made) == 0
    for step in range(1, 11):
        share = schedule.step(made, step)
        assert share == pytest.approx((1 - cos(pi * min(step / 8, 1))) / 2)
        assert scaling(made) == pytest.approx(2 * share)
    linear = model(shape="linear", steps=8)
    assert callback_for(linear).schedule.step(linear, 2) == 0.25  # type: ignore[union-attr]


def test_the_function_is_the_base_s_at_step_0_with_both_factors_there() -> None:
    made = model(start="random")
    ids = torch.randint(4, 60, (2, 9))
    made.eval()
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, tiny.model("llama")(input_ids=ids).logits)
        callback_for(made).schedule.step(made, 100)  # type: ignore[union-attr]
        assert (
            made(input_ids=ids).logits - tiny.model("llama")(input_ids=ids).logits
        ).abs().max() > 1


def test_it_rises_in_a_trainer_and_is_logged(tmp_path: Path) -> None:
    made = model(steps=4)
    trainer = train(made, 6, tmp_path)
    history = trainer.state.log_history
    shares = [row["adapter_share"] for row in history if "adapter_share" in row]
    assert shares == [0.25, 0.5, 0.75, 1]
    assert scaling(made) == 2
    made.save_pretrained(tmp_path / "adapter")
    assert made.peft_config["default"].lora_alpha == 8


def test_adaptive_waits_while_the_kl_is_over_its_budget() -> None:
    values = iter([0.0, 0.2, 0.2, 0.05, 0.0, 0.0, 0.0])
    schedule = ProgressiveScaling("adaptive", 4, {}, kl_budget=0.1, kl=lambda: next(values))
    made = model()
    shares = [schedule.step(made, step) for step in range(8)]
    assert shares == [0, 0.25, 0.25, 0.25, 0.5, 0.75, 1, 1]


def test_an_adapter_that_never_reached_its_target_is_saved_as_it_was(tmp_path: Path) -> None:
    made = model(shape="adaptive", steps=4, kl_budget=1e-9, start="random")
    train(made, 5, tmp_path)
    ids = torch.randint(4, 60, (2, 9))
    made.eval()
    with torch.no_grad():
        trained = made(input_ids=ids).logits
    assert 0 < scaling(made) < 2, "the first rise is free, then the KL is over any budget"
    assert made.peft_config["default"].lora_alpha == pytest.approx(4 * scaling(made))
    made.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trained)
    assert state_of(made).scaling == pytest.approx(scaling(made))


def test_a_resumed_run_goes_on_from_its_share(tmp_path: Path) -> None:
    whole = model(shape="adaptive", steps=8, kl_budget=1e9)
    train(whole, 6, tmp_path / "whole")
    cut = model(shape="adaptive", steps=8, kl_budget=1e9)
    train(cut, 3, tmp_path / "cut", save_strategy="steps", save_steps=3)
    assert callback_for(cut) is not None
    fresh = model(shape="adaptive", steps=8, kl_budget=1e9)
    train(fresh, 6, tmp_path / "cut", resume_from_checkpoint=str(tmp_path / "cut/checkpoint-3"))
    assert scaling(fresh) == pytest.approx(scaling(whole))


def test_the_kl_is_that_of_the_distributions() -> None:
    made = model(start="random")
    schedule = callback_for(made).schedule  # type: ignore[union-attr]
    ids = torch.randint(4, 60, (1, 9))
    kl = KL(made, (ids,))
    assert kl() == pytest.approx(0, abs=1e-6)
    schedule.step(made, 100)
    made.eval()
    with torch.no_grad():
        p = tiny.model("llama")(input_ids=ids).logits.double().log_softmax(-1)
        q = made(input_ids=ids).logits.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / 9
    assert kl() == pytest.approx(float(expected), rel=1e-4)


def test_a_start_that_changes_the_base_is_refused() -> None:
    with pytest.raises(UserError, match="leaves the base"):
        model(start="pissa")


def test_starting_twice_keeps_the_target() -> None:
    made = model(steps=4)
    initialize(made, "progressive", steps=4)
    callback_for(made).schedule.step(made, 4)  # type: ignore[union-attr]
    assert scaling(made) == 2
    initialize(made, "progressive", steps=4)
    initialize(made, "zero_b")
    assert scaling(made) == 2
    assert callback_for(made) is None


def alphas(of: PeftModel) -> tuple[float, float]:
    layer = of.base_model.model.model.layers[0].self_attn.q_proj
    return of.peft_config["default"].lora_alpha, layer.lora_alpha["default"]


class Break(TrainerCallback):  # type: ignore[misc]
    """Breaks off as a number that is not finite does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise ZeroDivisionError


@pytest.mark.parametrize("after", [0, 2])
def test_a_training_that_broke_off_leaves_the_target_for_the_next(
    after: int, tmp_path: Path
) -> None:
    made = model(steps=4)
    with pytest.raises(ZeroDivisionError):
        train(made, 6, tmp_path, more=[Break(after)])
    callback_for(made).schedule.finish(made)  # type: ignore[union-attr]
    assert (scaling(made), alphas(made)) == (2 * after / 4, (8 * after / 4, 8 * after / 4))
    again = copy.deepcopy(made)
    initialize(again, "zero_b")
    assert (scaling(again), alphas(again), callback_for(again)) == (2, (8, 8), None)
    trainer = train(made, 6, tmp_path)
    rows = [row["adapter_share"] for row in trainer.state.log_history if "adapter_share" in row]
    assert rows == [0.25, 0.5, 0.75, 1]
    assert (scaling(made), alphas(made)) == (2, (8, 8))


@pytest.mark.parametrize("steps", [2, 6], ids=["cut", "whole"])
def test_a_second_training_goes_on_at_the_first_one_s_strength(steps: int, tmp_path: Path) -> None:
    made = model(steps=4)
    train(made, steps, tmp_path)
    strength = 2 * min(steps / 4, 1)
    assert (scaling(made), alphas(made)[0]) == (strength, 4 * strength)
    seen: list[float] = []

    class Note(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seen.append(scaling(made))

    train(made, 3, tmp_path, more=[Note()])
    assert seen == [strength] * 3
    assert (scaling(made), alphas(made)[0]) == (strength, 4 * strength)
    initialize(made, "progressive", steps=4)
    callback_for(made).schedule.step(made, 4)  # type: ignore[union-attr]
    assert (scaling(made), alphas(made)) == (2, (8, 8))


def test_the_same_model_resumed_goes_on_rising(tmp_path: Path) -> None:
    made = model(steps=4)
    train(made, 2, tmp_path, save_strategy="steps", save_steps=2)
    trainer = train(made, 5, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rows = [row["adapter_share"] for row in trainer.state.log_history if "adapter_share" in row]
    assert rows == [0.25, 0.5, 0.75, 1]
    assert (scaling(made), alphas(made)) == (2, (8, 8))


class Elsewhere:
    """Token ids on another device: of use only once they were moved."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __getitem__(self, key: Any) -> Elsewhere:
        return Elsewhere(self.ids[key])

    def to(self, device: torch.device) -> torch.Tensor:
        assert device == torch.device("cpu")
        return self.ids


def test_the_kl_moves_its_texts_to_the_model() -> None:
    made = model(start="random")
    callback_for(made).schedule.step(made, 100)  # type: ignore[union-attr]
    ids = torch.randint(4, 60, (1, 9))
    assert KL(made, (Elsewhere(ids),))() == KL(made, (ids,))()  # type: ignore[arg-type]


def test_a_kl_that_fails_leaves_the_model_training() -> None:
    made = model(start="random").train()
    with pytest.raises(IndexError):
        KL(made, (torch.tensor([[tiny.VOCABULARY + 1]]),))()
    assert made.training


def test_its_start_takes_options() -> None:
    small, large = (model(start="tiny", start_options={"scale": s}) for s in (0.01, 0.1))
    a, b = (m.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
            for m in (small, large))  # fmt: skip
    torch.testing.assert_close(10 * a, b)
    with pytest.raises(UserError, match="no option 'size'"):
        model(start="tiny", start_options={"size": 1})
