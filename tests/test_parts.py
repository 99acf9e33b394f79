"""A batch trained in parts is the batch trained whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from loralab.adapters.attach import attach
from loralab.config import AdapterConfig, TrainingConfig
from loralab.config.dpo import PreferenceConfig
from loralab.gradient.collate import LENGTHS, flatten
from loralab.gradient.dpo import PairRow, reference_of, train_pairs
from loralab.gradient.loop import History
from loralab.gradient.parts import InParts, filled, parts_of
from loralab.gradient.rows import IGNORED, Row
from loralab.gradient.sft import train


def row(length: int, seed: int) -> Row:
    ids = torch.randint(
        4, tiny.VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)
    )
    tokens = tuple(ids.tolist())
    return Row(tokens, (IGNORED, *tokens[1:]))


LENGTHS_OF_ROWS = (5, 9, 3, 21, 4, 4, 12, 2)
ROWS = [row(n, seed) for seed, n in enumerate(LENGTHS_OF_ROWS)]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, [(5,), (9,), (3,), (21,), (4,), (4,), (12,), (2,)]),
        (14, [(5, 9), (3,), (21,), (4, 4), (12, 2)]),
        (60, [LENGTHS_OF_ROWS]),
    ],
)
def test_parts_are_whole_sequences_in_order(most: int, expected: list[tuple[int, ...]]) -> None:
    batch = flatten(ROWS)
    found = list(parts_of(batch, most))
    assert [part[LENGTHS] for part in found] == expected
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([part[name] for part in found], dim=1), batch[name])
    assert all(int(part["position_ids"][0, 0]) == 0 for part in found)


def test_a_part_is_filled_with_tokens_that_nobody_learns() -> None:
    batch = flatten(ROWS[:3])  # 17 tokens
    full = filled(batch, 8)
    assert full[LENGTHS] == (5, 9, 3, 7)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(full[name][:, :17], batch[name])
        assert full[name].shape == (1, 24)
    assert (full["labels"][0, 17:] == IGNORED).all()
    assert full["position_ids"][0, 17:].tolist() == list(range(7))
    assert filled(batch, 17) == batch


def parts_up_to(most: int | None) -> Callable[[InParts, Any], None]:
    def set_parts(trainer: InParts, causal: Any) -> None:
        trainer.tokens_at_once, trainer.multiple = most, 4

    return set_parts


def trained(monkeypatch: pytest.MonkeyPatch, most: int | None) -> tuple[History, list[Any]]:
    seen: list[int] = []
    monkeypatch.setattr("loralab.gradient.sft.set_parts", parts_up_to(most))
    base = tiny.model("llama")
    base.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    model = attach(base, AdapterConfig(rank=4, alpha=8.0), seed=0)
    settings = TrainingConfig(steps=6, batch_size=3, grad_accumulation=2, lr=5e-3)
    history = train(model, tiny.tokenizer(), ROWS, settings, seed=1)
    return history, [seen, [p.detach().clone() for p in model.parameters() if p.requires_grad]]


def test_training_in_parts_is_training_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, (at_once, weights) = trained(monkeypatch, None)
    cut, (by_parts, same) = trained(monkeypatch, 10)
    assert max(at_once) > 21
    assert max(by_parts) == 24  # the one sequence that is longer than a part, filled
    assert len(by_parts) > len(at_once)
    assert cut.losses == pytest.approx(whole.losses, abs=1e-5)
    for a, b in zip(weights, same, strict=True):
        # AdamW's first steps take a gradient's sign, whatever its size.
        assert (a - b).abs().max() < 1e-4 * max(1.0, float(a.abs().max()))


def preferred(monkeypatch: pytest.MonkeyPatch, most: int | None) -> tuple[History, list[Any]]:
    seen: list[int] = []
    monkeypatch.setattr("loralab.gradient.dpo.set_parts", parts_up_to(most))
    base = tiny.model("llama")
    base.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    model = attach(base, AdapterConfig(rank=4, alpha=8.0), seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    pairs = [PairRow(row(4 + n, n), row(9 - n % 5, 50 + n)) for n in range(9)]
    settings = TrainingConfig(steps=4, batch_size=5, grad_accumulation=2, lr=5e-3)
    history = train_pairs(
        model,
        tiny.tokenizer(),
        pairs,
        settings,
        PreferenceConfig(label_smoothing=0.1),
        1,
        reference=reference_of(model, "base"),
    )
    return history, seen


def test_pairs_are_not_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, at_once = preferred(monkeypatch, None)
    cut, by_parts = preferred(monkeypatch, 22)
    assert len(by_parts) > len(at_once)
    assert max(by_parts) < max(at_once)
    assert all(tokens % 4 == 0 for tokens in by_parts)
    assert cut.losses == pytest.approx(whole.losses, abs=1e-5)
    assert cut.grad_norms == pytest.approx(whole.grad_norms, rel=1e-3)
