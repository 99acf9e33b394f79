"""Supervised fine-tuning as a run: the same bits after a stop, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import tiny
from loralab import pipeline
from loralab.adapters.attach import attach
from loralab.config import AdapterConfig, SftConfig, TrainingConfig, parse
from loralab.engines.attention import attention_configs
from loralab.errors import UserError
from loralab.evaluate import evaluate, open_engine
from loralab.gradient import attention
from loralab.gradient.events import StepDone, TrainingEvent
from loralab.gradient.fine_tune import FineTuned, fine_tune
from loralab.gradient.loop import NonFiniteError, checkpoints, total_steps
from loralab.gradient.rows import Row, prepare
from loralab.gradient.sft import train
from loralab.run import Run
from loralab.tasks.supervised import task_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and rows for it."""
    path = tmp_path_factory.mktemp("sft")
    tiny.model("llama").save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    lines = [
        json.dumps(
            {"prompt": tiny.words(2 + i % 5, i), "completion": tiny.words(1 + i % 7, 99 + i)}
        )
        for i in range(25)
    ]
    (path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return path


def config_for(folder: Path, **changes: Any) -> SftConfig:
    values: dict[str, Any] = {
        "kind": "sft",
        "name": "tiny",
        "model": str(folder / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "data": {"path": str(folder / "rows.jsonl"), "test_share": 0.2},
        "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "training": {"steps": 9, "batch_size": 3, "lr": 5e-3, "max_length": 32, "save_every": 4},
        "evaluation": {"limit": 3, "every": 3},
        "generation": {"max_new_tokens": 8},
    }
    for key, change in changes.items():
        both = isinstance(change, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **change} if both else change
    made = parse(values, "test")
    assert isinstance(made, SftConfig)
    return made


def run_it(path: Path, config: SftConfig, stop_at: int | None = None) -> tuple[FineTuned, Run]:
    """Start the run, or resume the one that is there; stop after a step."""
    steps: list[int] = []

    def note(event: TrainingEvent) -> None:
        if isinstance(event, StepDone):
            steps.append(event.step)

    values = config.to_dict()
    fresh = not (path / "config.yaml").exists()
    with Run.create(path, values) if fresh else Run.resume(path, values) as run:
        # Asked at the end of a step, before the step is logged.
        return fine_tune(config, run, note, lambda: len(steps) + 1 == stop_at), run


def without_times(run: Run) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in run.metrics()]


def adapter_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_ends_in_the_same_bits(
    folder: Path, tmp_path: Path, accumulation: int
) -> None:
    # 9 steps of 3 x accumulation rows go through 20 rows more than once; dropout draws numbers.
    config = config_for(folder, training={"grad_accumulation": accumulation})
    whole, run = run_it(tmp_path / "whole", config)
    assert whole.complete
    assert len(set(whole.losses)) == 9

    first, cut = run_it(tmp_path / "cut", config, stop_at=2)
    assert (first.complete, first.steps) == (False, 2)
    # Killed without a word after step 6: the checkpoint of step 4 is the last.
    _, cut = run_it(tmp_path / "cut", config, stop_at=6)
    newest = checkpoints(cut.checkpoints)[-1]
    newest.rename(newest.with_name("lost"))
    assert [path.name for path in checkpoints(cut.checkpoints)] == ["checkpoint-4"]
    last, cut = run_it(tmp_path / "cut", config)
    assert last.complete
    assert last.losses == whole.losses
    assert without_times(cut) == without_times(run)
    assert cut.completions() == run.completions()
    assert same_tensors(adapter_of(cut), adapter_of(run))


def test_what_a_run_leaves_behind(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, training={"steps": 30, "lr": 2e-2})
    _, run = run_it(tmp_path / "run", config)
    metrics, completions = run.metrics(), run.completions()
    assert [row["step"] for row in metrics] == [0, *range(1, 31), 30]
    assert metrics[-2]["loss"] < 0.7 * metrics[1]["loss"]
    assert all(row["grad_norm"] > 0 and row["tokens"] > 0 for row in metrics[1:-1])
    phases = [row["phase"] for row in completions]
    assert (phases.count("before"), phases.count("after"), phases.count("during")) == (3, 3, 27)
    assert [r["completion"] for r in completions[:3]] != [r["completion"] for r in completions[-3:]]
    assert set(run.environment()) >= {"kernel", "rows", "rows_cut"}
    stored = sorted(p.name for p in checkpoints(run.checkpoints)[-1].iterdir())
    assert "training_args.bin" not in stored
    assert "adapter_model.safetensors" in stored

    # The adapter on disk answers as the one in training did.
    loaded = PeftModel.from_pretrained(tiny.model("llama"), run.adapter).peft_config["default"]
    assert (loaded.r, loaded.base_model_name_or_path) == (4, str(folder / "model"))
    engine, name = open_engine(str(folder / "model"), "float32", "cpu", str(run.adapter))
    again = evaluate(engine, task_of(config), config.generation, name, "test", 3)
    assert [r.text for r in again.rollouts] == [r["completion"] for r in completions[-3:]]


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"type": "lslora", "dropout": 0.0}},
        {"adapter": {"init": {"name": "pissa"}, "dropout": 0.0}},
        {"full": True, "adapter": None},
        {"training": {"packing": True, "epochs": 3.0, "steps": None}},
        {"training": {"gradient_checkpointing": True}},
    ],
    ids=["lslora", "pissa", "full", "packing", "checkpointing"],
)
def test_other_kinds_of_training_learn_resume_and_answer(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_for(folder, **changes)
    whole, run = run_it(tmp_path / "whole", config)
    assert whole.complete
    assert whole.losses[-1] < whole.losses[0]
    before, after = run.completions()[:3], run.completions()[-3:]
    assert [row["phase"] for row in before + after] == ["before"] * 3 + ["after"] * 3
    assert [row["completion"] for row in before] != [row["completion"] for row in after]
    run_it(tmp_path / "cut", config, stop_at=3)
    last, _ = run_it(tmp_path / "cut", config)
    assert last.losses == whole.losses
    if config.full:
        assert (run.path / "model" / "model.safetensors").is_file()


def test_an_adapter_that_starts_inside_the_weights_is_saved_against_the_true_base(
    folder: Path, tmp_path: Path
) -> None:
    config = config_for(folder, adapter={"init": {"name": "pissa"}, "dropout": 0.0})
    _, run = run_it(tmp_path / "run", config)
    engine, name = open_engine(str(folder / "model"), "float32", "cpu", str(run.adapter))
    again = evaluate(engine, task_of(config), config.generation, name, "test", 3)
    wanted = [row["completion"] for row in run.completions()[-3:]]
    assert [rollout.text for rollout in again.rollouts] == wanted


def some_rows(count: int = 12) -> tuple[Row, ...]:
    pairs = [(tiny.words(2 + i % 4, i), tiny.words(1 + i % 5, 50 + i), "x") for i in range(count)]
    return prepare(pairs, tiny.tokenizer(), 32).rows


def peft_model(seed: int = 0) -> Any:
    model = attach(tiny.model("llama"), AdapterConfig(rank=4, alpha=8.0), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_fast_step_trains_as_the_stock_step_does(accumulation: int) -> None:
    settings = TrainingConfig(
        steps=5, batch_size=3, lr=1e-2, warmup=2, grad_accumulation=accumulation
    )
    histories = []
    for fast in (True, False):
        model = peft_model()
        changed = settings.model_copy(update={"fast": fast})
        histories.append(train(model, tiny.tokenizer(), some_rows(), changed, seed=4))
        assert not any("forward" in vars(module) for module in model.modules())
        assert {c._attn_implementation for c in attention_configs(model)} == {"sdpa"}
        assert not model.training
    ours, stock = histories
    assert ours.losses == pytest.approx(stock.losses, abs=2e-4)
    assert ours.grad_norms == pytest.approx(stock.grad_norms, rel=1e-3)
    assert ours.learning_rates == pytest.approx(stock.learning_rates)
    assert ours.learning_rates[0] < ours.learning_rates[2]
    assert ours.tokens == stock.tokens
    assert ours.complete
    assert ours.steps == 5


def test_training_repeats_itself_in_one_process_and_the_seed_matters() -> None:
    settings = TrainingConfig(steps=4, batch_size=3, lr=1e-2)
    runs = [train(peft_model(), tiny.tokenizer(), some_rows(), settings, s) for s in (1, 1, 2)]
    assert runs[0].losses == runs[1].losses != runs[2].losses


def test_a_model_it_does_not_know_is_trained_the_stock_way_and_says_so() -> None:
    model = peft_model()
    model.get_base_model().config.model_type = "riddle"
    settings = TrainingConfig(steps=2, batch_size=3, lr=1e-2)
    told = train(model, tiny.tokenizer(), some_rows(), settings, seed=4)
    known = train(peft_model(), tiny.tokenizer(), some_rows(), settings, seed=4)
    assert told.losses == pytest.approx(known.losses, abs=1e-4)
    assert "riddle" in " ".join(told.notes)
    with pytest.raises(UserError, match="packing"):
        train(
            model, tiny.tokenizer(), some_rows(), settings.model_copy(update={"packing": True}), 4
        )


@pytest.mark.parametrize(
    # SDPA on the CPU makes finite numbers of a query that is not one: the gradient shows it.
    ("module", "what"),
    [("mlp.down_proj", "the loss"), ("q_proj", "the gradient's norm")],
)
def test_what_is_no_number_stops_before_it_reaches_the_weights(
    module: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "GROUPED", 0)
    model = peft_model()
    settings = TrainingConfig(steps=5, batch_size=3, lr=1e-2)
    weight = next(p for n, p in model.named_parameters() if f"{module}.lora_A" in n)
    weight.data[0, 0] = float("nan")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(NonFiniteError, match=f"step 1: {what} is nan"):
        train(model, tiny.tokenizer(), some_rows(), settings, seed=4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_a_run_with_a_loss_that_is_no_number_keeps_its_findings(
    folder: Path, tmp_path: Path
) -> None:
    config = config_for(folder, training={"lr": 1e30, "max_grad_norm": 0.0})
    with pytest.raises(UserError, match=r"step \d+: the (loss|gradient)"):
        pipeline.start(config, tmp_path / "run", lambda event: None)
    run = Run.open(tmp_path / "run")
    assert "numbers.nan" in [finding["rule"] for finding in run.findings()]
    assert (run.path / "report.html").is_file()
    assert run.metrics()


def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(
    folder: Path, tmp_path: Path
) -> None:
    config = config_for(folder)

    def terminate(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    _, result = pipeline.start(config, tmp_path / "run", terminate)
    assert not result.complete
    run = Run.open(tmp_path / "run")
    assert checkpoints(run.checkpoints)[-1].name == "checkpoint-5"
    assert (run.path / "report.html").is_file()
    _, result = pipeline.resume(tmp_path / "run", None, lambda event: None)
    assert result.complete
    _, undisturbed = run_it(tmp_path / "whole", config)
    assert without_times(Run.open(tmp_path / "run")) == without_times(undisturbed)


def test_what_a_user_can_mend_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, adapter={"target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(UserError, match=r"training: .*lm_head"):
        pipeline.start(config, tmp_path / "c", lambda event: None)
    config = config_for(folder, training={"optimizer": "adamw_torhc"})
    with pytest.raises(UserError, match="adamw_torhc") as caught:
        pipeline.start(config, tmp_path / "a", lambda event: None)
    assert "\n" not in str(caught.value)
    config = config_for(folder, data={"path": str(folder / "nothing.jsonl")})
    with pytest.raises(UserError, match="no such file"):
        pipeline.start(config, tmp_path / "b", lambda event: None)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [(20, {"steps": 7}, 7), (20, {"epochs": 2.0, "batch_size": 3}, 14), (7, {"epochs": 0.5}, 1)],
)
def test_total_steps(rows: int, changes: dict[str, Any], steps: int) -> None:
    settings = TrainingConfig(**{"batch_size": 4, **changes})
    assert total_steps(rows, settings) == steps
    made = some_rows(rows)
    assert train(peft_model(), tiny.tokenizer(), made, settings, 0).steps == steps
