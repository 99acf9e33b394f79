"""The guard in a plain Trainer: it sees what logs hide, changes nothing, and can go back."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

import tiny
from loralab import ranks
from loralab.errors import UserError
from loralab.health import GuardCallback, guard_view, pace
from loralab.health.condition import over
from loralab.health.findings import Finding
from loralab.health.ledger import FINDINGS, READINGS, Ledger
from loralab.health.pace import Pace
from loralab.health.reading import Reading
from loralab.health.rule import Rule
from loralab.health.thresholds import Limit
from loralab.health.training_watch import TrainingWatch
from watched_training import (
    PROMPTS,
    Halt,
    Losses,
    Note,
    adapted,
    rows,
    rules_of,
    same,
    trainer,
    weights,
)

LATE = Rule("test.late", "lr.too_high", fail=(over("train.step", Limit(10, "a test's")),))
"""Fails of what is looked at after step 10."""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_view, "TOKENS", 5)


def test_it_looks_at_its_steps_and_writes_what_it_saw(tmp_path: Path) -> None:
    told: list[str] = []
    guard = GuardCallback(PROMPTS, tell=told.append)
    made = trainer(tmp_path, adapted(), guard, steps=12)
    made.train()
    assert [one.step for one in guard.readings] == [0, 1, 5, 10, 12]
    lines = [json.loads(line) for line in (tmp_path / READINGS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 5, 10, 12]
    first, last = guard.readings[0].values, guard.readings[-1].values
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert last["kl"] > 1e-4
    assert (first["train.step"], last["train.progress"]) == (0, 1)
    assert last["data.rows"] == 16
    assert last["data.passes"] == 3
    assert last["guard.share"] > 0
    assert 2 <= len(guard.readings[0].examples) <= 4
    assert rules_of(guard) == set()
    assert len(told) == 1, "all that is measured could be"
    end = r"guard: sound; 5 looks took \d+ s beside \d+ s of training \(\d+\.\d%\)"
    assert re.fullmatch(end, told[0])
    shown = [row for row in made.state.log_history if "guard_kl" in row]
    assert len(shown) == 5


def test_every_sets_the_looks_after_the_first(tmp_path: Path) -> None:
    guard = GuardCallback(PROMPTS, every=6, texts=False)
    trainer(tmp_path, adapted(), guard, steps=65).train()
    assert [one.step for one in guard.readings] == [0, 1, 5, 10, 25, 50, 56, 62, 65]


def test_steps_between_looks_follow_the_measured_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace, "perf_counter", lambda: now[0])
    for cost, due in ((6.0, 100), (0.01, 75)):
        made = Pace(None, 0.03)
        now[0] = 0.0
        made.begin(0)
        now[0] = 50.0
        made.looked(0, 50.0)
        made.looked(25, cost)
        # 50 steps took 200 s; 6 s are 3 % of 200 s.
        now[0] = 250.0 + 2 * cost
        made.looked(50, cost)
        asked = [step for step in range(51, 200) if made.due(step)]
        assert asked[0] == due
    assert made.share == pytest.approx(50.02 / 200, rel=1e-3)
    made.end()
    now[0] = 9999.0
    assert made.share == pytest.approx(50.02 / 200, rel=1e-3), "the time after it is no training"


def test_a_training_that_is_resumed_late_is_looked_at_again(tmp_path: Path) -> None:
    for every, asked in ((None, [52, 52 + pace.LEAST]), (7, [52, 59, 66, 73, 80, 81])):
        guard = GuardCallback(PROMPTS, every=every, texts=False, budget=1.0)
        place = tmp_path / str(every)
        first = trainer(place, adapted(), None, steps=81, save_strategy="steps", save_steps=52)
        first.add_callback(Halt(52))
        first.train()
        made = trainer(place, adapted(), guard, steps=81, save_strategy="steps", save_steps=500)
        made.train(resume_from_checkpoint=True)
        steps = [one.step for one in guard.readings]
        assert steps[: len(asked)] == asked
        assert steps[-1] == 81


def test_a_training_that_is_watched_ends_in_the_same_bits(tmp_path: Path) -> None:
    made = []
    for watched in (False, True):
        model = adapted(dropout=0.2)
        guard = GuardCallback(PROMPTS) if watched else None
        trainer(tmp_path / str(watched), model, guard, steps=7).train()
        made.append(weights(model))
        made.append({"rng": torch.get_rng_state()})
    assert same(made[0], made[2])
    assert same(made[1], made[3])


class Noisy(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Makes its rows anew each time, of all the random numbers that there are."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, at: int) -> dict[str, Any]:
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        ids = [tiny.BOS, *(4 + int(one * 60) for one in drawn), tiny.EOS]
        return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}


def test_rows_made_at_random_are_those_of_a_training_without_it(tmp_path: Path) -> None:
    made = []
    for watched in (False, True):
        model = adapted()
        guard = GuardCallback(PROMPTS) if watched else None
        trainer(tmp_path / str(watched), model, guard, steps=3, data=Noisy()).train()
        made.append(weights(model))
        made.append({"python": torch.tensor([random.random(), np.random.rand()])})
        if guard is not None:
            assert guard.readings[0].values["data.all_masked"] == 0, "the rows were looked at"
    assert same(made[0], made[2])
    assert same(made[1], made[3])


def test_no_hook_stays(tmp_path: Path) -> None:
    model = adapted()
    before = sum(len(module._forward_hooks) for module in model.modules())
    trainer(tmp_path, model, GuardCallback(PROMPTS, texts=False), steps=2).train()
    assert sum(len(module._forward_hooks) for module in model.modules()) == before


def at_step(step: int, value: float) -> Losses:
    return lambda now: value if now == step else 1.0


def test_a_nan_that_the_log_hides_is_seen(tmp_path: Path) -> None:
    model, guard = adapted(), GuardCallback(PROMPTS, texts=False)
    made = trainer(tmp_path, model, guard, steps=4, logging_nan_inf_filter=True)
    made.factor = at_step(3, math.nan)
    made.train()
    assert all(math.isfinite(row["loss"]) for row in made.state.log_history if "loss" in row)
    found = {one.rule: one for one in guard.findings}
    assert found["numbers.nan"].step == 3
    assert guard.causes[0] == "numbers.nan"
    rows_ = [json.loads(line) for line in (tmp_path / FINDINGS).read_text().splitlines()]
    assert "numbers.nan" in {Finding.from_json(row).rule for row in rows_}


def test_a_loss_that_is_nan_where_the_model_returns_it(tmp_path: Path) -> None:
    guard = GuardCallback(PROMPTS)
    trainer(tmp_path, adapted(), guard, steps=2, data=rows(masked=True)).train()
    assert {"data.all_masked"} <= rules_of(guard)
    assert guard.causes[0] == "data.all_masked"


def test_stop_keeps_the_weights_before_a_step_that_is_no_number(tmp_path: Path) -> None:
    stopped, plain = adapted(), adapted()
    made = trainer(tmp_path / "a", stopped, GuardCallback(PROMPTS, "stop", texts=False), steps=6)
    made.factor = at_step(3, math.inf)
    made.train()
    assert made.state.global_step == 3
    # The same schedule, cut off after two steps.
    other = trainer(tmp_path / "b", plain, None, steps=6)
    other.factor = at_step(3, 0.0)
    seen: dict[int, dict[str, Tensor]] = {}
    other.add_callback(Note(seen))
    other.train()
    assert same(weights(stopped), seen[2])


def test_rollback_goes_back_once_and_stops_the_second_time(tmp_path: Path) -> None:
    model, told = adapted(), list[str]()
    guard = GuardCallback(PROMPTS, "rollback", texts=False, tell=told.append)
    made = trainer(tmp_path, model, guard, steps=12, lr_scheduler_type="constant")
    made.factor = lambda step: math.nan if step in (7, 9) else 1.0
    seen: dict[int, dict[str, Tensor]] = {}
    made.add_callback(Note(seen))
    made.train()
    # The last look that found nothing was after step 5.
    assert same(seen[7], seen[5])
    assert not same(seen[6], seen[5])
    assert made.state.global_step == 9
    assert same(weights(model), seen[5])
    rates = {row["step"]: row["learning_rate"] for row in made.state.log_history if "loss" in row}
    assert rates[6] == 5e-3
    assert rates[8] == 2.5e-3
    assert sum("went back" in line for line in told) == 2


def test_a_failure_seen_at_the_end_goes_back_too(tmp_path: Path) -> None:
    # Before the last checkpoint is written, and where another callback ended the training.
    for name, ends in (("steps", None), ("halted", Halt(12))):
        place = tmp_path / name
        model, told = adapted(), list[str]()
        guard = GuardCallback(PROMPTS, "rollback", rules=[LATE], texts=False, tell=told.append)
        made = trainer(
            place, model, guard, 20 if ends else 12, save_strategy="steps", save_steps=12
        )
        if ends is not None:
            made.add_callback(ends)
        seen: dict[int, dict[str, Tensor]] = {}
        made.add_callback(Note(seen))
        made.train()
        assert made.state.global_step == 12
        assert rules_of(guard) == {"test.late"}
        assert same(weights(model), seen[10])
        assert sum("went back" in line for line in told) == 1
        if ends is None:
            saved = load_file(place / "checkpoint-12" / "adapter_model.safetensors")
            kept = {name.replace(".default", ""): value for name, value in seen[10].items()}
            assert same(saved, kept), "the checkpoint has the healthy weights"


def test_the_best_checkpoint_is_judged_and_not_overwritten(tmp_path: Path) -> None:
    for name, best in (("best", True), ("last", False)):
        model, told = adapted(), list[str]()
        guard = GuardCallback(PROMPTS, "rollback", rules=[LATE], texts=False, tell=told.append)
        made = trainer(
            tmp_path / name,
            model,
            guard,
            steps=12,
            eval_dataset=rows(4),
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=4,
            save_steps=4,
            load_best_model_at_end=best,
            # The worst of a loss that falls: of the first checkpoint.
            metric_for_best_model="loss",
            greater_is_better=True,
        )
        seen: dict[int, dict[str, Tensor]] = {}
        made.add_callback(Note(seen))
        made.train()
        assert rules_of(guard) == {"test.late"}
        assert guard.readings[-1].step == 12
        assert same(weights(model), seen[4 if best else 10])
        assert sum("went back" in line for line in told) == (not best)


def test_processes_ask_each_other_at_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = TrainingWatch.gradients_ready

    def asked(mine: bool) -> list[int]:
        """After which steps a process asks the other one; the losses of steps 3 and 4 are no number
        in one of them, as in a batch that overflows in fp16."""
        steps: list[int] = []
        theirs: list[bool] = []
        guard = GuardCallback(PROMPTS, texts=False)
        made = trainer(tmp_path / str(mine), adapted(), guard, steps=6)

        def some_lost(watch: TrainingWatch, compare: bool = False) -> bool:
            sound, lost = ready(watch, compare), watch.step + 1 in (3, 4)
            watch.nonfinite += mine and lost
            theirs.append(lost and not mine)
            return sound and not (mine and lost)

        def agreed(own: bool) -> bool:
            steps.append(made.state.global_step)
            return own or bool(theirs and theirs.pop())

        monkeypatch.setattr(TrainingWatch, "gradients_ready", some_lost)
        monkeypatch.setattr(ranks, "world", lambda: 2)
        monkeypatch.setattr(ranks, "agreed", agreed)
        monkeypatch.setattr(ranks, "summed", lambda values: [2 * one for one in values])
        made.train()
        assert "numbers.nan" in rules_of(guard)
        assert guard.readings[-1].values["train.nonfinite"] == 2
        return steps

    assert asked(mine=True) == asked(mine=False)


def test_garbled_text_fails_and_rollback_returns_to_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of fewer than 8 the base's opinion is not asked.
    monkeypatch.setattr(guard_view, "TOKENS", 10)
    model = adapted()
    guard = GuardCallback(PROMPTS, "rollback")
    made = trainer(tmp_path, model, guard, steps=60, learning_rate=2.0)
    made.train()
    assert rules_of(guard)
    assert "lr.too_high" in guard.causes[:2], guard.causes
    assert made.state.global_step < 60


def test_faults_of_the_start_are_seen_before_the_first_step(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.zero_()
    before = weights(model)
    guard = GuardCallback(PROMPTS, "stop", texts=False)
    made = trainer(tmp_path, model, guard)
    made.train()
    assert rules_of(guard) == {"init.zero_factors"}
    assert guard.findings[0].step == 0
    assert made.state.global_step == 1, "a Trainer cannot be kept from its first step"
    assert same(weights(model), before), "but the step leaves everything as it was"


def test_random_factors_are_a_garbled_start(tmp_path: Path) -> None:
    model = adapted(init_lora_weights=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter *= 10
    guard = GuardCallback(PROMPTS)
    trainer(tmp_path, model, guard, steps=1).train()
    assert "init.garbled" in rules_of(guard)
    assert guard.causes[0] == "init.garbled"
    (found,) = [one for one in guard.findings if one.rule == "init.garbled"]
    assert found.examples


def test_an_adapter_outside_the_optimiser_fails(tmp_path: Path) -> None:
    model = adapted()
    elsewhere = [p for n, p in model.named_parameters() if "layers.0.self_attn.q" in n]
    optimiser = torch.optim.AdamW([p for p in elsewhere if p.requires_grad], lr=1e-2)
    guard = GuardCallback(PROMPTS, texts=False)
    trainer(tmp_path, model, guard, steps=5, optimizers=(optimiser, None)).train()
    assert "setup.left_out" in rules_of(guard)
    assert guard.causes[0] == "optimiser.adapter_left_out"
    values = guard.readings[-1].values
    assert values["setup.left_out"] == pytest.approx(6 / 8)
    assert values["update.none"] == pytest.approx(6 / 8)


def test_a_whole_model_is_compared_with_what_it_was(tmp_path: Path) -> None:
    model = tiny.model("llama")
    guard = GuardCallback(PROMPTS)
    trainer(tmp_path, model, guard, steps=2, learning_rate=1e-3).train()
    kl = [one.values["kl"] for one in guard.readings]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-3
    assert math.isnan(guard.readings[-1].values["train.dose"])


def test_an_end_that_the_collator_masks_is_seen(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    data = [{"input_ids": row["input_ids"]} for row in rows()]
    found = []
    for own in (tiny.tokenizer(), tokenizer):
        guard = GuardCallback(PROMPTS, tokenizer=own)
        collator = DataCollatorForLanguageModeling(own, mlm=False)
        folder = tmp_path / str(len(found))
        trainer(folder, adapted(), guard, steps=1, data=data, data_collator=collator).train()
        found.append(guard.readings[0].values["data.pad_is_eos_masked"])
    assert found == [0.0, 1.0]


def test_without_texts_or_a_tokenizer_numbers_are_judged(tmp_path: Path) -> None:
    told: list[str] = []
    guard = GuardCallback(PROMPTS, tell=told.append)
    made = trainer(tmp_path, adapted(), guard, steps=1)
    made.callback_handler.processing_class = None
    made.train()
    assert "text.length" not in guard.readings[0].values
    assert "weights.dead" in guard.readings[0].values
    assert any("no tokenizer" in line for line in told)


def test_a_probe_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError("float division")

    monkeypatch.setattr(guard_view.TextProbe, "measure", fails)
    monkeypatch.setattr(guard_view.WeightProbe, "measure_model", fails)
    told: list[str] = []
    guard = GuardCallback(PROMPTS, tell=told.append)
    trainer(tmp_path, adapted(), guard, steps=5).train()
    for name in ("text", "weights"):
        line = f"guard: {name} is measured no more: ZeroDivisionError: float division"
        assert told.count(line) == 1
    last = guard.readings[-1]
    assert last.step == 5
    assert last.values["kl"] > 0
    assert not {"text.length", "weights.dead"} & last.values.keys()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [({"action": "pray"}, "pray"), ({"every": 0}, "every is 0"), ({"budget": 0.0}, "budget is 0")],
)
def test_wrong_options_are_refused(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        GuardCallback(**options)


def test_a_finding_is_said_once_until_it_comes_back(tmp_path: Path) -> None:
    told: list[str] = []
    guard = GuardCallback(PROMPTS, texts=False, tell=told.append)
    trainer(tmp_path, adapted(), guard, steps=6, learning_rate=1e-6).train()
    assert sum("learning.little" in line for line in told) == 1
    assert len([one for one in guard.findings if one.rule == "learning.little"]) == 1


def test_a_resumed_training_goes_on_with_its_readings(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for step in (0, 1, 5, 10):
        ledger.add(Reading(step, {"kl": 0.1}, (), 0.1))
    found = Finding("text.empty", "warn", 10, "m", {}, "data.empty", (), "a")
    ledger.report([found])
    (tmp_path / FINDINGS).open("a").write('{"rule": "outlier_module", "what": "x"}\n')
    kept = Ledger(tmp_path).resume(5)
    assert [one.step for one in kept] == [0, 1]
    left = [json.loads(line) for line in (tmp_path / FINDINGS).read_text().splitlines()]
    assert [row["rule"] for row in left] == ["outlier_module"], "others' findings stay"
    assert Ledger(tmp_path).resume(0) == []
    assert (tmp_path / READINGS).read_text() == ""


def test_a_classifier_is_judged_by_its_numbers(tmp_path: Path) -> None:
    shape = {"num_labels": 2, "pad_token_id": tiny.PAD}
    config = tiny.CONFIGS["llama"]()
    config.update(shape)
    model = tf.AutoModelForSequenceClassification.from_config(config)
    data = [{"input_ids": row["input_ids"], "labels": at % 2} for at, row in enumerate(rows())]
    told: list[str] = []
    guard = GuardCallback(tell=told.append)
    trainer(tmp_path, model, guard, steps=2, data=data).train()
    assert any("writes no text" in line for line in told)
    assert guard.readings[-1].values["grad.norm"] > 0
    assert "data.all_masked" not in guard.readings[0].values
