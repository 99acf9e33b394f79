"""GGUF adapters: what llama.cpp computes with them, and the way back."""

from __future__ import annotations

import struct
from ctypes import c_float
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from loralab.adapters.interop import read_gguf, write_gguf
from loralab.adapters.interop.base import BaseShape, describe_base
from loralab.adapters.interop.gguf import reorder, restore
from loralab.adapters.state import AdapterState
from loralab.errors import UserError

gguf = pytest.importorskip("gguf")
PROMPT = [0, 5, 17, 33, 9, 60, 21, 8]


HEADS = {"q_proj": 4, "k_proj": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama")


def described(model: Any, path: Path) -> BaseShape:
    model.save_pretrained(path)
    return describe_base(str(path))


@pytest.fixture(scope="module")
def base(model: Any, tmp_path_factory: pytest.TempPathFactory) -> BaseShape:
    return described(model, tmp_path_factory.mktemp("base"))


def same(one: AdapterState, other: AdapterState) -> None:
    assert one.scaling == other.scaling
    assert set(one.factors) == set(other.factors)
    for module, factors in one.factors.items():
        for given, made in zip(factors, other.factors[module], strict=True):
            assert torch.equal(given.float(), made.float()), module


def base_gguf(model: Any, path: Path, architecture: str = "llama") -> None:
    """A tiny model itself as float32 GGUF without a vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(16)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    [kind] = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        module = name.split(".")[-2]
        if architecture == "llama" and module in HEADS:
            tensor = reorder(tensor, HEADS[module])
        target = table.get_name(name, (".weight", ".bias"))
        writer.add_tensor(target, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_logits(
    path: Path, adapter: Path | None, prompt: list[int], vocabulary: int
) -> torch.Tensor:
    """Logits (tokens, vocabulary) that llama.cpp computes, its cache in float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    assert loaded, path
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 128, 1, 1
    settings.type_k = settings.type_v = 0  # float32
    settings.flash_attn_type = 0  # it would round to float16
    context = llama_cpp.llama_init_from_model(loaded, settings)
    if adapter is not None:
        made = llama_cpp.llama_adapter_lora_init(loaded, str(adapter).encode())
        assert made, adapter
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(made)
        assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, (c_float * 1)(1.0)) == 0
    batch = llama_cpp.llama_batch_init(len(prompt), 0, 1)
    batch.n_tokens = len(prompt)
    for index, token in enumerate(prompt):
        batch.token[index], batch.pos[index] = token, index
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        batch.logits[index] = True
    assert llama_cpp.llama_decode(context, batch) == 0
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocabulary,)).copy()
        for i in range(len(prompt))
    ]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(loaded)
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_llama_cpp_computes_what_peft_does(kind: str, architecture: str, tmp_path: Path) -> None:
    model = tiny.model(kind)
    # llama.cpp knows no sliding window in Mistral: a prompt within it.
    prompt = PROMPT[: tiny.WINDOW]
    state = tiny.adapter(model, seed=1)
    base_gguf(model, tmp_path / "base.gguf", architecture)
    write_gguf(state, tmp_path / "adapter.gguf", described(model, tmp_path / "base"))
    ours = tiny.PeftReference(model, {"one": state})
    bare = llama_logits(tmp_path / "base.gguf", None, prompt, tiny.VOCABULARY)
    adapted = llama_logits(
        tmp_path / "base.gguf", tmp_path / "adapter.gguf", prompt, tiny.VOCABULARY
    )
    expected = ours.logits("one", prompt)
    assert (bare - ours.logits(None, prompt)).abs().max() < 1e-3
    assert (adapted - expected).abs().max() < 1e-3
    assert (expected - ours.logits(None, prompt)).abs().max() > 1  # the adapter does something


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact(
    model: Any, base: BaseShape, dtype: torch.dtype, tmp_path: Path
) -> None:
    drawn = tiny.adapter(model, seed=2, rank=3)
    state = replace(
        drawn,
        factors={name: type(f)(f.A.to(dtype), f.B.to(dtype)) for name, f in drawn.factors.items()},
    )
    write_gguf(state, tmp_path / "a.gguf", base)
    read = read_gguf(tmp_path / "a.gguf", base).state
    assert read.factors.keys() == state.factors.keys()
    same(state, read)


def test_reorder_is_llama_cpps_permutation() -> None:
    rows = torch.arange(16.0)[:, None]
    # One head of 8: rotary partners i and i + 4 become neighbours.
    assert reorder(rows, 2)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(restore(reorder(rows, 2), 2), rows)


def test_another_models_adapter_is_refused(model: Any, base: BaseShape, tmp_path: Path) -> None:
    other = tiny.adapter(tiny.model("gpt2"), seed=3)
    with pytest.raises(UserError, match="no such linear module"):
        write_gguf(other, tmp_path / "a.gguf", base)


def test_not_an_adapter_is_refused(model: Any, base: BaseShape, tmp_path: Path) -> None:
    base_gguf(model, tmp_path / "base.gguf")
    with pytest.raises(UserError, match=r"general.type None"):
        read_gguf(tmp_path / "base.gguf", base)
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        read_gguf(tmp_path / "junk.gguf", base)


def test_a_count_beyond_the_file_ends(base: BaseShape, tmp_path: Path) -> None:
    """An array of 2^60 numbers in a file of a few bytes: refused, not read for ever."""
    key = b"general.tags"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    array = struct.pack("<IIQ", 9, 4, 2**60)
    (tmp_path / "a.gguf").write_bytes(header + struct.pack("<Q", len(key)) + key + array)
    with pytest.raises(UserError, match="counts more than it holds"):
        read_gguf(tmp_path / "a.gguf", base)


def test_quantised_factors_are_refused(model: Any, base: BaseShape, tmp_path: Path) -> None:
    write_gguf(tiny.adapter(model, seed=4), tmp_path / "a.gguf", base)
    data = (tmp_path / "a.gguf").read_bytes()
    name = b"blk.0.attn_q.weight.lora_a"
    place = data.index(name) + len(name) + 4 + 16
    for kind, said in ((24, "I8"), (0, None)):
        (tmp_path / "b.gguf").write_bytes(
            data[:place] + struct.pack("<I", kind) + data[place + 4 :]
        )
        if said is None:
            read_gguf(tmp_path / "b.gguf", base)
        else:
            with pytest.raises(UserError, match=f"is {said}; expected F32"):
                read_gguf(tmp_path / "b.gguf", base)
