"""Adapters of a real model in mlx-lm, llama.cpp and vLLM: the same text as in Transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import loralab
import tiny
from loralab.adapters.interop import read_peft, write_gguf, write_mlx
from loralab.adapters.interop.base import describe_base
from loralab.adapters.state import AdapterState
from loralab.models.load import packaged_file
from test_interop_gguf import llama_logits

pytestmark = pytest.mark.slow
TOKENS = 24
TEXT = "The three most important things to know about the ocean are"
VLLM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return loralab.load("smollm2", dtype="float32")


@pytest.fixture(scope="module")
def state(loaded: tuple[Any, Any]) -> AdapterState:
    """Rank 8, B random: enough to change the text, not enough to garble it."""
    return tiny.adapter(loaded[0], seed=11, rank=8, scaling=2.0, size=0.04)


@pytest.fixture(scope="module")
def texts(loaded: tuple[Any, Any], state: AdapterState) -> dict[str | None, tuple[int, ...]]:
    model, tokenizer = loaded
    prompt = tokenizer(TEXT)["input_ids"]
    reference = tiny.PeftReference(model, {"one": state})
    made = {name: reference.greedy(name, prompt, TOKENS) for name in ("one", None)}
    assert made["one"] != made[None]
    return made


def test_mlx_lm_writes_the_same_text(
    loaded: tuple[Any, Any], state: AdapterState, texts: Any, tmp_path: Path
) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model, tokenizer = loaded
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    # mlx-lm does not know Transformers 5's rope_parameters and would take 10000.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    write_mlx(state, tmp_path / "mlx", 30)
    for name, path in ((None, None), ("one", str(tmp_path / "mlx"))):
        theirs, _ = load(str(tmp_path / "model"), adapter_path=path)
        prompt = mx.array(tokenizer(TEXT)["input_ids"])
        found = [int(t) for t, _ in generate_step(prompt, theirs, max_tokens=TOKENS)]
        wanted = texts[name]
        assert tuple(found[: len(wanted)]) == wanted


def test_llama_cpp_agrees_as_far_as_its_base_does(
    loaded: tuple[Any, Any], state: AdapterState, texts: Any, tmp_path: Path
) -> None:
    """llama.cpp rounds activations to 8 bits, which its base shows too."""
    pytest.importorskip("llama_cpp")
    model, tokenizer = loaded
    ids = [*tokenizer(TEXT)["input_ids"], *texts["one"]]
    write_gguf(state, tmp_path / "adapter.gguf", describe_base("smollm2"))
    size = model.config.vocab_size
    base = llama_logits(packaged_file("smollm2"), None, ids, size).log_softmax(-1)
    found = llama_logits(packaged_file("smollm2"), tmp_path / "adapter.gguf", ids, size)
    found = found.log_softmax(-1)
    reference = tiny.PeftReference(model, {"one": state})
    expected = reference.logits("one", ids).log_softmax(-1)
    bare = reference.logits(None, ids).log_softmax(-1)

    def kl(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert kl(expected, found) < 3 * kl(bare, base)
    assert kl(expected, found) < kl(expected, bare) / 20
    same = (found.argmax(-1) == expected.argmax(-1)).float()[-TOKENS:]
    assert same.mean() > 0.9


@pytest.mark.skipif(not VLLM.exists(), reason="no .venv-vllm; make test-vllm makes it")
@pytest.mark.timeout(900)
def test_vllm_writes_the_text_of_our_engine(
    loaded: tuple[Any, Any], state: AdapterState, tmp_path: Path
) -> None:
    from loralab.bench.vllm_peer import Vllm
    from loralab.bench.workloads import Workload
    from loralab.engines.base import Request, Sampling
    from loralab.engines.batched import BatchedEngine

    model, tokenizer = loaded
    state.save(tmp_path / "adapter")
    read = read_peft(tmp_path / "adapter").state
    engine = BatchedEngine(copy.deepcopy(model), tokenizer)
    engine.load({"one": read})
    [ours] = engine.generate([Request(TEXT, "one", Sampling(max_new_tokens=TOKENS))])
    [bare] = engine.generate([Request(TEXT, None, Sampling(max_new_tokens=TOKENS))])
    assert ours.text != bare.text
    peer = Vllm(VLLM, model, tokenizer, "float32", 1, 8, 128, 4)
    try:
        peer.load({"one": read})
        work = Workload("one", "one", (TEXT,), (tuple(tokenizer(TEXT)["input_ids"]),), TOKENS)
        [found] = peer.generate(work)
    finally:
        peer.close()
    assert tokenizer.decode(found, skip_special_tokens=True).startswith(ours.text)
