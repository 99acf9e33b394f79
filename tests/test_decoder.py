"""The small decoder: many adapters on it, its training, its experts, its start."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

import tiny
from loralab.config import TrainingConfig
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.gradient import attention, loss
from loralab.gradient.collate import flatten
from loralab.gradient.held_out import mean_loss
from loralab.gradient.rows import Row, prepare
from loralab.gradient.sft import train
from loralab.models.decoder import DecoderConfig, DecoderForCausalLM
from loralab.models.moe import load_balance
from small_decoder import KINDS, SHAPE, decoder, labelled, tokens


@pytest.mark.parametrize("kind", ["split", "fused", "experts"])
def test_the_torch_engine_runs_it_with_many_adapters(kind: str) -> None:
    model = decoder(**KINDS[kind])
    names = [
        n for n in tiny.linear_names(model) if not n.endswith("mlp.gate") and "expert" not in n
    ]
    assert any("qkv" in n for n in names) == (kind == "fused")
    adapters = {f"a{i}": tiny.adapter(model, i, names=names) for i in range(3)}
    engine = BatchedEngine(model, tiny.tokenizer(), backend="torch")
    engine.load(adapters)
    reference = tiny.PeftReference(model, adapters)
    prompts = [tiny.words(3 + i, i) for i in range(3)]
    requests = [
        Request(prompt, name, Sampling(max_new_tokens=10))
        for prompt in prompts
        for name in adapters
    ]
    texts = set()
    for request, done in zip(requests, engine.generate(requests), strict=True):
        prompt = tiny.tokenizer()(request.prompt)["input_ids"]
        assert done.tokens == reference.greedy(request.adapter, prompt, 10)
        texts.add(done.text)
    assert len(texts) > len(prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_through_gradient_checkpointing(kind: str) -> None:
    model = decoder(**KINDS[kind])
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    adapted = {n.split(".")[-4] for n, _ in peft.named_parameters() if "lora_B" in n}
    wanted = {"qkv", "out_proj"} if "fused" in kind else {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert wanted | {"gate_proj", "up_proj", "down_proj"} <= adapted
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    ids, mask, labels = labelled(2, 16)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            peft.gradient_checkpointing_enable({"use_reentrant": False})
        peft.train()
        peft.zero_grad()
        peft(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in peft.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().sum() > 0 for g in gradients[0]) or "experts" in kind


@pytest.mark.parametrize("kind", ["split", "fused"])
def test_our_fine_tuning_takes_it_the_fast_way_and_learns_as_trl_does(kind: str) -> None:
    pairs = [(tiny.words(2 + i % 4, i), tiny.words(1 + i % 5, 50 + i), "x") for i in range(12)]
    rows = prepare(pairs, tiny.tokenizer(), 32).rows
    told = []
    for fast in (True, False):
        model = get_peft_model(decoder(**KINDS[kind]), LoraConfig(r=4, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        settings = TrainingConfig(steps=4, batch_size=3, lr=1e-2, fast=fast)
        told.append(train(model, tiny.tokenizer(), rows, settings, seed=4))
    assert told[0].notes == ()
    assert told[0].losses == pytest.approx(told[1].losses, abs=2e-4)
    assert told[0].grad_norms == pytest.approx(told[1].grad_norms, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_on_labelled_tokens_of_flat_rows_is_its_own_on_padded_ones(kind: str) -> None:
    model = decoder(**KINDS[kind]).train()
    assert loss.reason_against(model) is None
    assert attention.reason_against(model) is None
    ids, mask, labels = labelled(3, 24)
    # Experts weigh batches by their tokens, padded or not: only the mask keeps them equal.
    model.config.load_balance_coef = 0.5
    plain = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    plain.backward()
    expected = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    sizes = mask.sum(1).tolist()
    rows = [
        Row(tuple(i[:n].tolist()), tuple(w[:n].tolist()))
        for i, w, n in zip(ids, labels, sizes, strict=True)
    ]
    with loss.labelled_head(model), attention.named_attention(model, attention.NAME):
        flat = model(**flatten(rows)).loss
    flat.backward()
    torch.testing.assert_close(flat, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, expected, atol=1e-5, rtol=1e-4)


def test_the_load_balance_of_several_batches_does_not_grow_with_their_number() -> None:
    model = decoder(num_experts=4, load_balance_coef=0.3).train()
    ids = tokens(4, 12)
    parts = [model(input_ids=ids[i : i + 2], labels=ids[i : i + 2], num_items_in_batch=44)
             for i in (0, 2)]  # fmt: skip
    alone = [model(input_ids=ids[i : i + 2], labels=ids[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(
        parts[0].aux_loss + parts[1].aux_loss, (alone[0].aux_loss + alone[1].aux_loss) / 2
    )
    torch.testing.assert_close(parts[0].loss + parts[1].loss, (alone[0].loss + alone[1].loss) / 2)


def test_the_load_balance_is_least_for_even_use() -> None:
    even = torch.eye(4).repeat(5, 1) * 9
    lopsided = torch.tensor([[9.0, 0, 0, 0]]).repeat(20, 1)
    assert load_balance([even], 1).item() == pytest.approx(1.0)
    assert load_balance([lopsided], 1).item() == pytest.approx(4.0, rel=1e-2)
    mask = torch.tensor([[1] * 20, [0] * 20])
    both = torch.cat([even, lopsided])
    assert load_balance([both], 1, mask).item() == pytest.approx(1.0)


@pytest.mark.parametrize("flat", [True, False])
def test_what_is_held_out_is_judged_by_its_likelihood_alone(
    flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(num_experts=4, load_balance_coef=5.0)
    if not flat:
        monkeypatch.setattr(loss, "reason_against", lambda model: "asked for by the test")
    rows = [
        Row(tuple(ids), (-100, *ids[1:])) for ids in (tokens(1, n, n)[0].tolist() for n in (9, 5))
    ]
    total = sum(
        float(cross_entropy(model(torch.tensor([row.input_ids])).logits[0, :-1],
                            torch.tensor(row.labels[1:]), reduction="sum"))
        for row in rows
    )  # fmt: skip
    assert mean_loss(model, rows, 2) == pytest.approx(total / 12, rel=1e-5)
    ids = tokens(2, 9)
    training = model.train()(input_ids=ids, labels=ids)
    assert float(training.aux_loss) > 1
    model.eval()
    alone = model(input_ids=ids, labels=ids)
    assert alone.aux_loss is None
    torch.testing.assert_close(alone.loss + training.aux_loss, training.loss)


def test_no_future_token_is_seen() -> None:
    for changes in (*KINDS.values(), {"cache_size": 6, "attention_sinks": 2}):
        model, ids = decoder(**changes), tokens(1, 15)
        changed = ids.clone()
        changed[0, 10] = (ids[0, 10] + 1) % tiny.VOCABULARY
        a, b = model(ids, use_cache=False).logits, model(changed, use_cache=False).logits
        # Experts see other numbers of tokens, whose sums are rounded otherwise.
        assert torch.allclose(a[:, :10], b[:, :10], atol=1e-5)
        assert not torch.allclose(a[:, 10:], b[:, 10:], atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": 60}, "even multiple"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"attention": "both"}, "'split' or 'fused'"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "1 to the 2 experts"),
        ({"attention_sinks": 2}, "no sinks"),
        ({"attention_sinks": 4, "cache_size": 4}, "no room"),
        ({"attention_sinks": 4, "cache_size": 95}, "less than max_position_embeddings 96"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DecoderConfig(**{**SHAPE, **changes})


def test_the_start_is_small_where_the_residual_stream_is_written() -> None:
    torch.manual_seed(0)
    model = DecoderForCausalLM(
        DecoderConfig(**SHAPE | {"hidden_size": 256, "num_hidden_layers": 8})
    )
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert torch.equal(copy.deepcopy(model).model.norm.weight, torch.ones(256))
