"""The small decoder against Transformers' Llama and Mixtral, and everything it has to work with."""

from __future__ import annotations

import copy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

import tiny
from loralab import cli
from loralab.config import TrainingConfig
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.errors import UserError
from loralab.gradient import attention, loss
from loralab.gradient.collate import flatten
from loralab.gradient.rows import Row, prepare
from loralab.gradient.sft import train
from loralab.models.decoder import DecoderConfig, DecoderForCausalLM
from loralab.models.decoder_export import export, from_llama, to_llama, to_mixtral
from loralab.models.load import load
from loralab.models.moe import load_balance
from loralab.models.sinks import SinkCache

SHAPE: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "pad_token_id": tiny.PAD,
}
KINDS: dict[str, dict[str, Any]] = {
    "split": {},
    "fused": {"attention": "fused"},
    "tied": {"tie_word_embeddings": True},
    "experts": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40},
    "fused experts": {"attention": "fused", "num_experts": 3, "num_experts_per_tok": 1},
}


def decoder(seed: int = 0, **changes: Any) -> Any:
    """Random everywhere, norms too, large enough to give distinct logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        context = min(changes.get("cache_size", 96), 96)
        shape = {**SHAPE, "max_position_embeddings": context, **changes}
        made = DecoderForCausalLM(DecoderConfig(**shape))
        for parameter in made.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return made.eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCABULARY, (rows, length), generator=generator)


def labelled(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels of rows padded on the right, their first third not learned."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, length - 3 * row :] = 0 if row else 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : length // 3] = -100
    return ids, mask, labels


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_llama_or_mixtral_it_is_exported_to(kind: str) -> None:
    model = decoder(**KINDS[kind])
    other = (to_mixtral if "experts" in kind else to_llama)(model)
    ids, mask, labels = labelled(3, 30)
    ours = model(input_ids=ids, attention_mask=mask, labels=labels)
    router = {"output_router_logits": True} if "experts" in kind else {}
    theirs = other(input_ids=ids, attention_mask=mask, labels=labels, **router)
    assert ours.logits.std() > 0.5
    seen = mask.bool()
    torch.testing.assert_close(ours.logits[seen], theirs.logits[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    torch.testing.assert_close(
        model.model.embed_tokens.weight.grad, other.model.embed_tokens.weight.grad,
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == (kind == "tied")
    if "experts" in kind:
        with pytest.raises(UserError, match="not a Llama"):
            from_llama(other)
    else:
        back = from_llama(other)(input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(back.logits[seen], theirs.logits[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_agrees_with_the_export_padded_and_cached(kind: str) -> None:
    model = decoder(**KINDS[kind])
    other = (to_mixtral if "experts" in kind else to_llama)(model)
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    ids[1, :5], mask[1, :5] = tiny.PAD, 0
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    out = model.generate(**asked)
    assert torch.equal(out, other.generate(**asked))
    assert torch.equal(out, model.generate(**asked, use_cache=False))
    assert len(set(out[:, 12:].flatten().tolist())) > 3


@pytest.mark.parametrize("kind", ["split", "fused experts", "tied"])
def test_it_is_saved_and_loaded_by_name_alone(kind: str, tmp_path: Path) -> None:
    model, ids = decoder(**KINDS[kind]), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    again, tokenizer = load(tmp_path / "model", dtype="float32")
    assert type(again) is DecoderForCausalLM
    for name, value in SHAPE.items():
        assert getattr(again.config, name) == KINDS[kind].get(name, value)
    assert torch.equal(again(ids).logits, model(ids).logits)
    exported = export(tmp_path / "model", tmp_path / "exported")
    other = tf.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert other.config.model_type == ("mixtral" if "experts" in kind else "llama")
    torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert (
        tf.AutoTokenizer.from_pretrained(exported)("aa bb").input_ids
        == tokenizer("aa bb").input_ids
    )
    with pytest.raises(UserError, match="exists"):
        export(tmp_path / "model", tmp_path / "exported")


def test_what_an_export_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match="use to_mixtral"):
        to_llama(decoder(num_experts=2))
    with pytest.raises(UserError, match="use to_llama"):
        to_mixtral(decoder())
    model, ids = decoder(cache_size=20, attention_sinks=2), tokens(1, 20)
    with pytest.raises(UserError, match="without_sinks=True"):
        to_llama(model)
    torch.testing.assert_close(to_llama(model, True)(ids).logits, model(ids).logits)


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


def test_the_native_engine_runs_its_export() -> None:
    model = decoder(attention="fused", intermediate_size=96).bfloat16()
    exported = to_llama(model)
    assert exported.dtype == torch.bfloat16
    try:
        engine = BatchedEngine(exported, tiny.tokenizer(), backend="native")
    except UserError as error:
        pytest.skip(str(error))
    requests = [Request(tiny.words(4, i), None, Sampling(max_new_tokens=6)) for i in range(4)]
    native = engine.generate(requests)
    plain = BatchedEngine(model, tiny.tokenizer(), backend="torch").generate(requests)
    agree = sum(a.tokens[:2] == b.tokens[:2] for a, b in zip(native, plain, strict=True))
    assert agree >= 3


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
    model = decoder(**KINDS[kind])
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
    model = decoder(num_experts=4, load_balance_coef=0.3)
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


def test_no_future_token_is_seen() -> None:
    for changes in (*KINDS.values(), {"cache_size": 6, "attention_sinks": 2}):
        model, ids = decoder(**changes), tokens(1, 15)
        changed = ids.clone()
        changed[0, 10] = (ids[0, 10] + 1) % tiny.VOCABULARY
        a, b = model(ids, use_cache=False).logits, model(changed, use_cache=False).logits
        # Experts see other numbers of tokens, whose sums are rounded otherwise.
        assert torch.allclose(a[:, :10], b[:, :10], atol=1e-5)
        assert not torch.allclose(a[:, 10:], b[:, 10:], atol=1e-2)


def streaming_reference(model: Any, ids: torch.Tensor, sinks: int, size: int) -> torch.Tensor:
    """StreamingLLM written out: keys before rotation, rotated by their place in the cache, anew at
    every token."""
    caches: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in model.model.layers]
    llama = tf.models.llama.modeling_llama
    out = []
    for token in ids[0]:
        x = model.model.embed_tokens(token)[None, None]
        for layer, cache in zip(model.model.layers, caches, strict=True):
            q, k, v = layer.self_attn.project(layer.input_layernorm(x))
            cache.append((k, v))
            if len(cache) > size:
                del cache[sinks]
            keys, values = (torch.cat(part, dim=2) for part in zip(*cache, strict=True))
            rope = llama.LlamaRotaryEmbedding(to_llama(decoder()).config)
            cos, sin = rope(keys, torch.arange(len(cache))[None])
            _, keys = llama.apply_rotary_pos_emb(keys, keys, cos, sin)
            q, _ = llama.apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
            keys, values = (t.repeat_interleave(2, dim=1) for t in (keys, values))
            weights = (q @ keys.transpose(2, 3) * layer.self_attn.scaling).softmax(-1)
            mixed = (weights @ values).transpose(1, 2).reshape(1, 1, -1)
            x = x + layer.self_attn.o_proj(mixed)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        out.append(model.lm_head(model.model.norm(x)))
    return torch.cat(out, dim=1)


@pytest.mark.parametrize(("sinks", "size"), [(0, 7), (1, 8), (3, 9), (4, 40)])
@torch.no_grad()
def test_sinks_are_those_of_streaming_llm(sinks: int, size: int) -> None:
    model, ids = decoder(cache_size=size, attention_sinks=sinks), tokens(1, 30)
    expected = streaming_reference(model, ids, sinks, size)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)
    for cuts in (range(31), (0, 30), (0, 5, 6, 19, 30), (0, min(size, 29), 30)):
        cache, parts = SinkCache(model.config), []
        for a, b in pairwise(cuts):
            parts.append(model(ids[:, a:b], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-4)
        assert cache.kept == min(size, 30)
        assert cache.get_seq_length() == 30
        assert cache.layers[0].keys.shape[2] == min(size, 30)
    plain = decoder()(ids).logits
    assert torch.allclose(plain[:, :size], expected[:, :size], atol=1e-5)
    assert torch.allclose(plain, expected, atol=1e-3) == (size >= 30)


def test_generation_with_sinks_runs_past_the_trained_context() -> None:
    model, ids = decoder(cache_size=10, attention_sinks=2, eos_token_id=None), tokens(2, 6)
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
    )
    assert out.shape == (2, 46)
    for at in range(6, 46):
        logits = model(out[:, :at], use_cache=False).logits[:, -1]
        assert torch.equal(logits.argmax(-1), out[:, at])
    beams = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, num_beams=3, do_sample=False
    )
    assert beams.shape == (2, 26)


def test_what_a_cache_of_fixed_size_cannot_do_is_said() -> None:
    model, ids = decoder(cache_size=10, attention_sinks=2), tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="padding"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="SinkCache"):
        model(ids, past_key_values=tf.DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="16 tokens are more than cache_size 10"):
        model(ids[:1], sequence_lengths=(16,), use_cache=False)
    # In short texts nothing is let go, and padding is as in any model.
    plain = decoder()(ids[:, :9], attention_mask=mask[:, :9], use_cache=False).logits
    short = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=False).logits
    assert torch.equal(short, plain)


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


@pytest.mark.parametrize("kind", ["fused", "fused experts"])
def test_the_command_exports_what_plain_transformers_loads(
    kind: str, tmp_path: Path, capsys: Any
) -> None:
    model, ids = decoder(**KINDS[kind]), tokens(2, 9)
    source = tmp_path / "run" / "model"
    model.save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    (tmp_path / "run" / "config.yaml").write_text("kind: pretrain\n")
    out = tmp_path / "out"
    assert cli.main(["export", str(tmp_path / "run"), "--to", "llama", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert ("MixtralForCausalLM" if "experts" in kind else "LlamaForCausalLM") in said
    assert "lost: nothing" in said
    script = (
        "import sys, torch, transformers as tf\n"
        "model = tf.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "tokenizer = tf.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert not any(name.startswith('loralab') for name in sys.modules)\n"
        f"torch.save(model(torch.tensor({ids.tolist()})).logits.detach(), sys.argv[2])\n"
        "print(tokenizer('aa bb').input_ids)\n"
    )
    logits = tmp_path / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", script, str(out), str(logits)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tiny.tokenizer()("aa bb").input_ids)
    theirs = torch.load(logits, weights_only=True)
    torch.testing.assert_close(theirs, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert cli.main(["export", str(source), "--to", "llama", "--output", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--without-sinks"),
        (["--without-sinks", "--base", "smollm2"], "--base"),
        (["--without-sinks", "--rank", "4"], "--rank"),
    ],
)
def test_the_command_lets_sinks_go_only_when_asked(
    words: list[str], said: str, tmp_path: Path, capsys: Any
) -> None:
    decoder(cache_size=32, attention_sinks=2).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "--to", "llama", "--output"]
    capsys.readouterr()  # the bars of save_pretrained
    assert cli.main([*command, str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    if not words:
        assert cli.main([*command, str(tmp_path / "out"), "--without-sinks"]) == 0
        assert "sinks" in capsys.readouterr().out
