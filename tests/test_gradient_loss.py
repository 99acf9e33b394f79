"""The fast step is the stock step: same loss, same gradients, padded or not, head whole or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tiny
from loralab.gradient import attention, loss
from loralab.gradient.attention import NAME, named_attention, sequence_attention
from loralab.gradient.collate import flatten, pad, token_count
from loralab.gradient.loss import labelled_head, labelled_loss
from loralab.gradient.rows import IGNORED, Row, pack

KINDS = sorted(tiny.CONFIGS)


def rows(seed: int = 0, count: int = 4, longest: int = 17) -> list[Row]:
    """Rows of different lengths, longer than the models' sliding window, prompts not learned."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = 3 + (index * 5 + seed) % (longest - 2)
        ids = torch.randint(4, tiny.VOCABULARY, (length,), generator=generator).tolist()
        prompt = index % length  # 0: the first token has a label, which nothing predicts
        made.append(Row(tuple(ids), (IGNORED,) * prompt + tuple(ids[prompt:])))
    return made


def with_lora(kind: str) -> Any:
    """A PEFT model with random A and B."""
    made = tiny.model(kind)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=tiny.linear_names(made), task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(made, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()  # no dropout: it would differ between the two layouts


def gradients(model: Any, batch: dict[str, Any], count: int) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    value = model(**batch, num_items_in_batch=torch.tensor(count))["loss"]
    value.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(value.detach()), found


def same(ours: tuple[float, dict[str, Tensor]], stock: tuple[float, dict[str, Tensor]]) -> None:
    assert abs(ours[0] - stock[0]) < 1e-5
    assert ours[1].keys() == stock[1].keys()
    for name, gradient in stock[1].items():
        scale = gradient.abs().max().clamp_min(1e-3)
        assert (ours[1][name] - gradient).abs().max() < 1e-5 * max(1.0, float(scale)), name
    assert any(g.abs().max() > 1e-3 for g in stock[1].values())


@pytest.mark.parametrize("longest_grouped", [0, attention.GROUPED], ids=["sdpa", "grouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_flat_batches_give_the_loss_and_gradients_of_padded_ones(
    kind: str, longest_grouped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "GROUPED", longest_grouped)
    model, batch = with_lora(kind), rows()
    causal = model.get_base_model()
    count = sum(row.learned for row in batch)
    stock = gradients(model, pad(batch, tiny.PAD), count)
    assert loss.reason_against(causal) is None
    assert attention.reason_against(causal) is None
    with labelled_head(causal):
        same(gradients(model, pad(batch, tiny.PAD), count), stock)
        with named_attention(causal, NAME):
            same(gradients(model, flatten(batch), count), stock)
    assert "forward" not in vars(causal)


def test_gradient_checkpointing_does_not_change_the_flat_step() -> None:
    model, batch = with_lora("llama"), rows()
    causal = model.get_base_model()
    stock = gradients(model, pad(batch, tiny.PAD), 20)
    model.enable_input_require_grads()
    causal.gradient_checkpointing_enable()
    model.train()
    with labelled_head(causal), named_attention(causal, NAME):
        same(gradients(model, flatten(batch), 20), stock)


def test_packed_rows_do_not_see_each_other() -> None:
    model, batch = with_lora("llama"), rows(count=6)
    causal = model.get_base_model()
    packed = pack(batch, 24)
    assert len(packed) < len(batch)
    assert sorted(n for row in packed for n in row.sequences) == sorted(
        len(row.input_ids) for row in batch
    )
    assert sum(row.learned for row in packed) == sum(row.learned for row in batch)
    with labelled_head(causal), named_attention(causal, NAME):
        same(
            gradients(model, flatten(packed), 30),
            gradients(model, flatten(batch), 30),
        )


def test_masks_of_long_sequences_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "GROUPED", 8)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 30, 8, generator=generator) for _ in range(3))
    before = attention._kept_mask.cache_info().misses
    found, _ = sequence_attention(nn.Module(), q, k, v, None, sliding_window=11)
    assert attention._kept_mask.cache_info().misses == before
    monkeypatch.setattr(attention, "GROUPED", 64)
    wanted, _ = sequence_attention(nn.Module(), q, k, v, None, sliding_window=11)
    assert attention._kept_mask.cache_info().misses == before + 1
    torch.testing.assert_close(found, wanted)


def test_a_sequence_depends_on_itself_alone() -> None:
    model = with_lora("llama").eval()
    causal = model.get_base_model()
    first, second = rows(count=2)
    with torch.no_grad(), named_attention(causal, NAME):
        batch = flatten([first, second])
        together = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        other = Row(tuple(reversed(first.input_ids)), first.labels)
        changed = flatten([other, second])
        apart = model(**{k: v for k, v in changed.items() if k != "labels"}).logits[0]
    at = len(first.input_ids)
    assert torch.equal(together[at:], apart[at:])
    assert not torch.allclose(together[:at], apart[:at])


def test_in_bf16_the_gradients_are_as_near_to_fp32_as_the_stock_ones() -> None:
    exact, coarse = with_lora("llama"), with_lora("llama")
    for name, parameter in coarse.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
            exact.get_parameter(name).data = parameter.data.float()
    batch, count = rows(count=6), 40
    _, wanted = gradients(exact, pad(batch, tiny.PAD), count)
    _, stock = gradients(coarse, pad(batch, tiny.PAD), count)
    with labelled_head(coarse.get_base_model()), named_attention(coarse, NAME):
        _, ours = gradients(coarse, flatten(batch), count)

    def error(found: dict[str, Tensor]) -> float:
        off = sum(float((found[n] - g).square().sum()) for n, g in wanted.items())
        return (off / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5

    assert error(ours) < 1.25 * error(stock) < 0.2


def test_attention_it_cannot_compute_is_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="softcap"):
        sequence_attention(nn.Module(), q, q, q, None, softcap=30.0)
    with pytest.raises(ValueError, match="2 rows"):
        sequence_attention(nn.Module(), *[torch.randn(2, 2, 4, 8)] * 3, None)


@pytest.mark.parametrize("bias", [False, True])
def test_head_loss_is_cross_entropy_with_all_its_gradients(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "PIECE", 3)
    torch.manual_seed(1)
    head = nn.Linear(8, 23, bias=bias)
    hidden = torch.randn(2, 9, 8, requires_grad=True)
    labels = torch.randint(0, 23, (2, 9))
    labels[0, :4] = IGNORED
    leaves = [hidden, *head.parameters()]
    ours = labelled_loss(hidden, labels, head)
    found = torch.autograd.grad(2.5 * ours, leaves)
    logits = head(hidden)[:, :-1].reshape(-1, 23)
    stock = nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=IGNORED)
    wanted = torch.autograd.grad(2.5 * stock, leaves)
    assert torch.allclose(ours, stock, atol=1e-6)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_models_it_does_not_know_keep_their_own_loss() -> None:
    made = tiny.model("llama")
    made.config.final_logit_softcapping = 30.0
    assert "soft-capped" in str(loss.reason_against(made))
    other = tiny.model("llama")
    other.config.model_type = "granite"
    assert "granite" in str(loss.reason_against(other))
    assert "granite" in str(attention.reason_against(other))


def test_flat_labels_never_cross_a_border_and_tokens_are_counted() -> None:
    batch = [Row((5, 6, 7), (5, 6, 7)), Row((8, 9), (8, 9))]
    flat = flatten(batch)
    assert flat["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert token_count(flat) == token_count(pad(batch, tiny.PAD)) == 5
    assert [row.learned for row in batch] == [2, 1]
