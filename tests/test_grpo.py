"""GRPO: against the formula in fp32, its reference, its run on a tiny model, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import tiny
from loralab import pipeline
from loralab.adapters import initialize
from loralab.adapters.attach import attach
from loralab.adapters.true_base import true_base
from loralab.config import AdapterConfig, GrpoConfig, TrainingConfig, parse
from loralab.config.grpo import PolicyConfig
from loralab.errors import UserError
from loralab.gradient.events import Remark, StepDone
from loralab.gradient.grpo import Sampled, advantages, train_policy
from loralab.gradient.loop import checkpoints
from loralab.gradient.reinforce import places
from loralab.gradient.rows import Row
from loralab.run import Run


def peft_model(init: str = "zero_b", seed: int = 0, moved: float = 0.0) -> Any:
    model = attach(tiny.model("llama"), AdapterConfig(rank=4, alpha=8.0), seed)
    if init != "zero_b":
        initialize(model, init, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += moved * torch.randn(parameter.shape, generator=generator)
    return model


def some_groups(seed: int = 0) -> list[list[Sampled]]:
    """Three prompts of four random completions; all of the last have one reward."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 67, (count,), generator=generator).tolist())

    groups = []
    for number in range(3):
        prompt = ids(3 + number)
        group = []
        for member in range(4):
            answer = ids(2 + (number + member) % 3)
            row = Row(prompt + answer, (-100,) * len(prompt) + answer)
            group.append(Sampled(row, 0.5 if number == 2 else float(member % 3), None))
        groups.append(group)
    return groups


def test_advantages_are_in_deviations_of_the_group() -> None:
    assert advantages([1, 2, 3], "none") == [-1, 0, 1]
    scaled = advantages([1, 2, 3], "group")
    assert scaled == pytest.approx([-(1.5**0.5), 0, 1.5**0.5], rel=1e-3)
    assert advantages([0.3] * 4, "group") == [0] * 4


def token_log_probs(model: Any, row: Row, temperature: float) -> torch.Tensor:
    ids = torch.tensor([row.input_ids])
    log_p = (model(input_ids=ids).logits[0, :-1] / temperature).log_softmax(-1)
    learned = torch.tensor(row.labels)[1:] != -100
    return log_p.gather(1, ids[0, 1:, None])[learned, 0]


def plain_loss(model: Any, old: list[torch.Tensor], policy: PolicyConfig) -> torch.Tensor:
    """One completion at a time, whole logits, the formula as it is written."""
    total, number = torch.zeros(()), 0
    groups = some_groups()
    every = [one for group in groups for one in group]
    tokens = sum(one.row.learned for one in every)
    for group in groups:
        rewards = torch.tensor([one.reward for one in group])
        gains = (rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-4)
        for one, gain in zip(group, gains, strict=True):
            now = token_log_probs(model, one.row, policy.temperature)
            with torch.no_grad(), true_base(model):
                ref = token_log_probs(model, one.row, policy.temperature)
            ratio = (now - old[number]).exp()
            value = torch.minimum(
                ratio * gain, ratio.clamp(1 - policy.clip, 1 + policy.clip) * gain
            )
            value = value - policy.beta * ((ref - now).exp() - (ref - now) - 1)
            over = tokens if policy.mean == "token" else len(every) * one.row.learned
            total = total - value.sum() / over
            number += 1
    return total


@pytest.mark.parametrize("init", ["zero_b", "pissa"])
@pytest.mark.parametrize(
    ("mean", "beta", "temperature", "fast"),
    [("token", 0.0, 1.0, True), ("sequence", 0.3, 1.7, True), ("token", 0.3, 0.8, False)],
)
def test_two_updates_on_one_batch_are_those_of_the_formula(
    init: str, mean: Any, beta: float, temperature: float, fast: bool
) -> None:
    policy = PolicyConfig(
        mean=mean, beta=beta, temperature=temperature, updates=2, clip=0.05, micro_batch=5
    )
    settings = TrainingConfig(
        steps=2, batch_size=3, lr=0.05, optimizer="sgd", schedule="constant", max_grad_norm=0.0,
        fast=fast,
    )  # fmt: skip
    plain = peft_model(init, moved=0.05)
    with torch.no_grad():
        every = [one for group in some_groups() for one in group]
        old = [token_log_probs(plain, one.row, temperature) for one in every]
    values, norms = [], []
    for _ in range(2):
        value = plain_loss(plain, old, policy)
        value.backward()
        values.append(float(value))
        trained = [p for p in plain.parameters() if p.grad is not None]
        norms.append(float(torch.stack([p.grad.norm() for p in trained]).norm()))
        for parameter in trained:
            parameter.data -= 0.05 * parameter.grad
            parameter.grad = None
    calls = []

    def sample(model: Any, number: int) -> Any:
        calls.append(number)
        return some_groups()

    model = peft_model(init, moved=0.05)
    history = train_policy(model, tiny.tokenizer(), sample, settings, policy, 0)
    assert calls == [0]
    assert history.losses == pytest.approx(values, abs=2e-5, rel=1e-5)
    assert history.grad_norms == pytest.approx(norms, rel=1e-3)
    # The clip held something back, or the second norm would not need it.
    unclipped = plain_loss(plain, old, policy.model_copy(update={"clip": 0.9}))
    clipped = plain_loss(plain, old, policy)
    assert abs(float(unclipped - clipped)) > 1e-4


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_second_update_holds_back_the_tokens_that_a_count_by_hand_finds(
    micro_batch: int | None,
) -> None:
    policy = PolicyConfig(updates=2, clip=0.05, clip_high=0.02, micro_batch=micro_batch)
    settings = TrainingConfig(
        steps=2, batch_size=3, lr=0.05, optimizer="sgd", schedule="constant", max_grad_norm=0.0
    )
    plain, ended = peft_model(moved=0.05), peft_model(moved=0.05)
    rows, gains = [], []
    for group in some_groups():
        of_group = advantages([one.reward for one in group], "group")
        learned = [(one.row, gain) for one, gain in zip(group, of_group, strict=True) if gain]
        rows += [row for row, _ in learned]
        gains += [gain for _, gain in learned]
    with torch.no_grad():
        old = [token_log_probs(plain, row, 1.0) for row in rows]
    # One step of plain gradient descent; in it all ratios are 1, and nothing is clipped.
    tokens = sum(one.row.learned for group in some_groups() for one in group)
    first = -sum(
        gain * token_log_probs(plain, row, 1.0).sum() for row, gain in zip(rows, gains, strict=True)
    )
    (first / tokens).backward()
    for parameter in plain.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.05 * parameter.grad
            parameter.grad = None
    held, total = [], torch.zeros(())
    for row, gain, before in zip(rows, gains, old, strict=True):
        ratio = (token_log_probs(plain, row, 1.0) - before).exp()
        # A ratio past the clip counts as a number, without a gradient, where it went the way
        # that its advantage asks for: up for a good answer, down for a bad one.
        out = (ratio > 1.02) if gain > 0 else (ratio < 0.95)
        held += out.tolist()
        limit = 1.02 if gain > 0 else 0.95
        total = total - gain * torch.where(out, torch.tensor(limit), ratio).sum() / tokens
    total.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()

    steps: list[dict[str, float]] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                steps.append(dict(logs))

    train_policy(
        ended, tiny.tokenizer(), lambda model, number: some_groups(), settings, policy, 0,
        callbacks=[Watch()],
    )  # fmt: skip
    assert 0 < sum(held) < len(held)
    assert [row["clipped"] for row in steps] == pytest.approx([0, sum(held) / len(held)])
    assert steps[1]["loss"] == pytest.approx(float(total), abs=2e-5)
    assert steps[1]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


@pytest.mark.parametrize("init", ["zero_b", "pissa", "olora"])
def test_the_divergence_from_the_true_base_begins_at_zero(init: str) -> None:
    told = []
    for micro_batch in (None, 5):
        found: list[float] = []

        class Watch(TrainerCallback):  # type: ignore[misc]
            def on_log(
                self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
            ) -> None:
                if "kl" in logs:
                    found.append(logs["kl"])  # noqa: B023  used in this turn alone

        settings = TrainingConfig(steps=2, batch_size=3, lr=1e-2)
        train_policy(
            peft_model(init), tiny.tokenizer(), lambda model, number: some_groups(number),
            settings, PolicyConfig(beta=0.1, micro_batch=micro_batch), 0, callbacks=[Watch()],
        )  # fmt: skip
        told.append(found)
    assert told[0][0] == pytest.approx(0, abs=1e-6)
    assert told[0][1] > 1e-5
    # Over all tokens, however many pieces they run in.
    assert told[1][1] == pytest.approx(told[0][1], rel=1e-3)


def test_a_batch_in_which_all_are_equal_changes_nothing() -> None:
    model = peft_model(moved=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    settings = TrainingConfig(steps=2, batch_size=3, lr=1e-2)
    same = [[Sampled(one.row, 0.5, None) for one in group] for group in some_groups()]
    history = train_policy(model, tiny.tokenizer(), lambda m, n: same, settings, PolicyConfig(), 0)
    assert history.losses == (0.0, 0.0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_every_pass_goes_through_all_prompts_in_an_order_of_its_own() -> None:
    drawn = [place for number in range(6) for place in places(9, 3, number, seed=1)]
    assert sorted(drawn[:9]) == sorted(drawn[9:]) == list(range(9))
    assert drawn[:9] != drawn[9:]
    assert places(9, 3, 1, seed=2) != places(9, 3, 1, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and prompts whose right answer is always the same word."""
    path = tmp_path_factory.mktemp("grpo")
    tiny.model("llama").save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    rows = [{"prompt": tiny.words(3, i), "completion": "bc"} for i in range(20)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def config_for(folder: Path, **changes: Any) -> GrpoConfig:
    values: dict[str, Any] = {
        "kind": "grpo",
        "name": "tiny",
        "model": str(folder / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "task": {
            "name": "supervised",
            "options": {"path": str(folder / "rows.jsonl"), "test_share": 0.3},
        },
        "grpo": {"group": 16},
        "adapter": {"rank": 4, "alpha": 8.0},
        "training": {
            "steps": 8,
            "batch_size": 4,
            "lr": 3e-2,
            "schedule": "constant",
            "max_length": 40,
            "save_every": 4,
        },
        "generation": {"max_new_tokens": 1},
        **changes,
    }
    made = parse(values, "test")
    assert isinstance(made, GrpoConfig)
    return made


def without_times(run: Run) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in run.metrics()]


@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_raises_the_reward_and_resumes_to_the_same_bits(
    folder: Path, tmp_path: Path, updates: int
) -> None:
    config = config_for(folder, grpo={"group": 16, "updates": updates, "beta": 0.01})
    _, result = pipeline.start(config, tmp_path / "whole", lambda event: None)
    assert result.complete
    run = Run.open(tmp_path / "whole")
    before, *steps, after = run.metrics()
    assert [row["completions"] for row in steps[:4]] == (
        [64, 128, 192, 256] if updates == 1 else [64, 64, 128, 128]
    )
    assert before["held_out_reward"] < 0.4
    if updates == 1:
        assert steps[-1]["reward_mean"] > 2 * steps[0]["reward_mean"]
        assert after["held_out_reward"] > before["held_out_reward"]
    else:
        assert all(row["clipped"] == 0 for row in steps[::2])
        assert any(row["clipped"] > 0 for row in steps[1::2])
    assert {"correct", "flat_groups", "length", "clipped", "kl"} <= steps[0].keys()
    assert (run.path / "report.html").is_file()

    def stop(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.start(config, tmp_path / "cut", stop)
    cut = Run.open(tmp_path / "cut")
    assert [path.name for path in checkpoints(cut.checkpoints)] == ["checkpoint-4"]
    pipeline.resume(tmp_path / "cut", None, lambda event: None)
    assert without_times(Run.open(tmp_path / "cut")) == without_times(run)
    assert Run.open(tmp_path / "cut").completions() == run.completions()


@pytest.mark.parametrize(("longest", "told"), [(6, 1), (40, 0)])
def test_completions_that_lose_their_end_are_told_of_once(
    folder: Path, tmp_path: Path, longest: int, told: int
) -> None:
    said: list[str] = []
    config = config_for(
        folder,
        training={"steps": 2, "batch_size": 2, "lr": 1e-3, "max_length": longest},
        generation={"max_new_tokens": 5},
        evaluation={"limit": 1},
    )

    def note(event: Any) -> None:
        if isinstance(event, Remark):
            said.append(event.text)

    pipeline.start(config, tmp_path / "run", note)
    assert sum("learned without their end" in text for text in said) == told


def test_what_a_config_cannot_mean_is_said(folder: Path) -> None:
    with pytest.raises(UserError, match=r"multiple of grpo\.updates"):
        config_for(folder, grpo={"updates": 3})
    with pytest.raises(UserError, match="not epochs"):
        config_for(folder, training={"epochs": 1.0})
