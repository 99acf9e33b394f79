"""The guard in a plain Trainer: it sees what logs hide, changes nothing, and can go back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import tiny
from loralab.errors import UserError
from loralab.health import GuardCallback
from loralab.health import guard as guard_module
from loralab.health.findings import Finding
from loralab.health.ledger import FINDINGS, READINGS, Ledger
from loralab.health.reading import Reading
from loralab.health.setup import setup_values
from loralab.health.snapshot import Snapshot, halve_learning_rate
from loralab.health.training_watch import TrainingWatch, planned_dose

PROMPTS = [tiny.words(4, 100 + at) for at in range(4)]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "TOKENS", 5)


def adapted(seed: int = 0, dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
        **options,
    )
    return get_peft_model(tiny.model("llama"), config)


def rows(count: int = 16, masked: bool = False) -> list[dict[str, Any]]:
    made = []
    for at in range(count):
        ids = [*tiny.tokenizer()(tiny.words(10, at))["input_ids"], tiny.EOS]
        labels = [-100] * len(ids) if masked else list(ids)
        made.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return made


Losses = Callable[[int], float]


class Poisoned(Trainer):  # type: ignore[misc]
    """Multiplies the loss of some steps, behind what the model returned."""

    factor: Losses = staticmethod(lambda step: 1.0)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().compute_loss(*args, **kwargs)
        return loss * self.factor(self.state.global_step + 1)


def trainer(
    folder: Path, model: Any, guard: GuardCallback | None, steps: int = 6, **options: Any
) -> Poisoned:
    data = options.pop("data", None)
    more = {key: options.pop(key) for key in ("optimizers", "data_collator") if key in options}
    arguments = {
        "max_steps": steps,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return Poisoned(
        model=model,
        args=TrainingArguments(str(folder), **(arguments | options)),
        train_dataset=rows() if data is None else data,
        processing_class=tiny.tokenizer(),
        callbacks=[] if guard is None else [guard],
        **more,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rules_of(guard: GuardCallback, severity: str = "fail") -> set[str]:
    return {one.rule for one in guard.findings if one.severity == severity}


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
    assert first["train.step"] == 0
    assert last["train.progress"] == 1
    assert last["data.rows"] == 16
    assert last["data.passes"] == 3
    assert last["guard.share"] > 0
    assert 2 <= len(guard.readings[0].examples) <= 4
    assert rules_of(guard) == set()
    assert told[-1].startswith("guard: ")
    shown = [row for row in made.state.log_history if "guard_kl" in row]
    assert len(shown) == 5


def test_every_sets_the_looks_after_the_first(tmp_path: Path) -> None:
    guard = GuardCallback(PROMPTS, every=6, texts=False)
    trainer(tmp_path, adapted(), guard, steps=65).train()
    assert [one.step for one in guard.readings] == [0, 1, 5, 10, 25, 50, 56, 62, 65]


def test_steps_between_looks_follow_the_measured_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = GuardCallback(budget=0.03)
    guard._began, guard.seconds, guard._first = 0.0, 100.0, 0
    guard._costs = [50.0, 6.0, 6.0]
    monkeypatch.setattr(guard_module, "perf_counter", lambda: 300.0)

    class At:
        global_step = 50

    guard._plan(At())  # type: ignore[arg-type]
    # 200 s of training made 50 steps, 4 s each; 6 s are 3 % of 200 s, which are 50 steps.
    assert guard._next == 50
    guard._costs = [50.0, 0.01]
    guard._plan(At())  # type: ignore[arg-type]
    assert guard._next == guard_module.LEAST


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
    seen: list[dict[str, Tensor]] = []

    class Note(guard_module.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.append(weights(more["model"]))

    other.add_callback(Note())
    other.train()
    assert same(weights(stopped), seen[1])


def test_rollback_goes_back_once_and_stops_the_second_time(tmp_path: Path) -> None:
    model, told = adapted(), list[str]()
    guard = GuardCallback(PROMPTS, "rollback", texts=False, tell=told.append)
    made = trainer(tmp_path, model, guard, steps=12, lr_scheduler_type="constant")
    made.factor = lambda step: math.nan if step in (7, 9) else 1.0
    seen: dict[int, dict[str, Tensor]] = {}

    class Note(guard_module.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen[state.global_step] = weights(more["model"])

    made.add_callback(Note())
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


def test_garbled_text_fails_and_rollback_returns_to_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        guard_module, "TOKENS", 10
    )  # of fewer than 8 the base's opinion is not asked
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


def model_and_batch() -> tuple[Any, dict[str, Tensor]]:
    model = adapted().train()
    return model, {
        key: torch.tensor([row[key] for row in rows(4)]) for key in ("input_ids", "labels")
    }


def test_the_watch_measures_gradients_and_updates() -> None:
    model, batch = model_and_batch()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    watch = TrainingWatch(model, steps=4)
    watch.begin()
    model(**batch)["loss"].backward()
    assert watch.gradients_ready(compare=True)
    before = weights(model)
    optimiser.step()
    watch.step_done(1, 0.5)
    after = weights(model)
    moved = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before))
    size = math.sqrt(sum(float(before[n].square().sum()) for n in before))
    values = watch.values(rows=4)
    assert values["update.ratio"] == pytest.approx(moved / size, rel=1e-4)
    # B is 0, so A has no gradient yet and half of the tensors stand still.
    assert values["update.none"] == 0.5
    assert values["train.progress"] == 0.25
    assert values["data.passes"] == 0.5
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    name = "base_model.model.model.layers.1.self_attn.v_proj"
    pair = [grads[f"{name}.lora_{part}.default.weight"] for part in "AB"]
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in pair if grad is not None))
    assert watch.by_module()[name] == pytest.approx(norm, rel=1e-5)
    assert len(watch.by_module()) == 4
    watch.end()
    assert not model._forward_hooks


@pytest.mark.parametrize(("fp16", "sound"), [(False, False), (True, True)])
def test_an_overflow_is_usual_under_loss_scaling_only(fp16: bool, sound: bool) -> None:
    model, batch = model_and_batch()
    watch = TrainingWatch(model, fp16=fp16)
    model(**batch)["loss"].backward()
    next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)  # type: ignore[union-attr]
    assert watch.gradients_ready() is sound
    assert watch.nonfinite == (0 if sound else 1)


def test_a_loss_is_read_in_training_only() -> None:
    model, batch = model_and_batch()
    watch = TrainingWatch(model)
    watch.begin()
    bad = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with torch.no_grad():
        model(**bad)
    model.eval()(**bad)
    assert watch.gradients_ready()
    model.train()(**bad)
    assert not watch.gradients_ready()
    assert watch.nonfinite == 1
    watch.end()


def test_losses_are_means_of_the_first_and_the_newest_steps() -> None:
    watch = TrainingWatch(adapted())
    for step in range(1, 21):
        watch.logged(step, {"loss": 4.0 if step <= 5 else 1.0 if step > 15 else 2.0})
    values = watch.values()
    assert values["train.loss_share"] == 0.25
    assert values["train.loss_rise"] == -0.75
    rare = TrainingWatch(adapted())
    for step in (10, 20, 30):
        rare.logged(step, {"loss": float(step), "grad_norm": 1.0 if step < 30 else 90.0})
    assert rare.values()["train.loss_first"] == 10
    assert rare.values()["train.loss"] == 30
    assert rare.values()["grad.spike"] == 90


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_the_planned_dose_is_the_sum_of_the_rates(tmp_path: Path, schedule: str) -> None:
    guard = GuardCallback(PROMPTS, texts=False)
    made = trainer(tmp_path, adapted(), guard, steps=8, lr_scheduler_type=schedule, warmup_steps=3)
    made.train()
    rates = [row["learning_rate"] for row in made.state.log_history if "loss" in row]
    assert guard.readings[0].values["train.dose"] == pytest.approx(sum(rates), rel=1e-6)


def test_sgd_has_no_dose() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimiser = torch.optim.SGD([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0)
    assert math.isnan(planned_dose(optimiser, schedule, 5))
    adam = torch.optim.AdamW([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1.0)
    assert planned_dose(adam, schedule, 5) == pytest.approx(0.5)


def test_a_snapshot_restores_weights_and_moments_to_the_bit() -> None:
    model, batch = model_and_batch()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))

    def steps(count: int) -> None:
        for _ in range(count):
            optimiser.zero_grad()
            model(**batch)["loss"].backward()
            optimiser.step()

    steps(3)
    kept = Snapshot(model, optimiser, 3)
    before = weights(model)
    steps(2)
    after = weights(model)
    assert not same(before, after)
    kept.restore(model, optimiser)
    assert same(weights(model), before)
    steps(2)
    assert same(weights(model), after), "the moments came back too"
    kept.restore(model, optimiser)
    halve_learning_rate(optimiser, schedule)
    assert optimiser.param_groups[0]["lr"] == 5e-3
    optimiser.step()
    schedule.step()
    assert optimiser.param_groups[0]["lr"] == 2.5e-3


def test_setup_reads_scaling_off_its_config() -> None:
    model = adapted()
    assert setup_values(model)["setup.scaling"] == 0
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.scaling["default"] *= 2
    assert setup_values(model)["setup.scaling"] == pytest.approx(math.log(2))
    rooted = adapted(use_rslora=True)
    assert setup_values(rooted)["setup.scaling"] == pytest.approx(0)


def test_setup_knows_a_start_that_was_not_prepared() -> None:
    assert "setup.unprepared" not in setup_values(adapted())
    model = adapted(init_lora_weights="eva")
    assert setup_values(model)["setup.unprepared"] == 1
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = torch.linalg.qr(parameter.data.T).Q.T.contiguous()
    assert setup_values(model)["setup.unprepared"] == 0


def test_sharded_optimisers_are_not_judged() -> None:
    flat = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    assert "setup.left_out" not in setup_values(adapted(), flat)


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
