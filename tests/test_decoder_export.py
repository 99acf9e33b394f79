"""The small decoder is the Llama or Mixtral that it is exported to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import tiny
from loralab import cli
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.errors import UserError
from loralab.models.decoder import DecoderForCausalLM
from loralab.models.decoder_export import export, from_llama, to_llama, to_mixtral
from loralab.models.load import load
from small_decoder import KINDS, SHAPE, decoder, labelled, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_llama_or_mixtral_it_is_exported_to(kind: str) -> None:
    model = decoder(**KINDS[kind])
    other = (to_mixtral if "experts" in kind else to_llama)(model)
    ids, mask, labels = labelled(3, 30)
    ours = model.train()(input_ids=ids, attention_mask=mask, labels=labels)
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
