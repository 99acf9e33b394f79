"""The native kernels: the engine's contract, and what only they promise."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf

import tiny
from engine_contract import EngineContract
from loralab.adapters.state import AdapterState
from loralab.engines.backend import BASE
from loralab.engines.batched import BatchedEngine
from loralab.engines.native import build
from loralab.engines.native.backend import MODULES, NativeBackend
from loralab.engines.native.pages import PAGE, PagePool
from loralab.errors import UserError

try:
    build.library()
except build.NativeUnavailableError as error:
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)

MEMBERS = (0, 0, 1, BASE, 2, 2, 2, BASE, 1)
LENGTHS = (5, 40, 17, 33, 1, 16, 32, 48, 21)


class TestNative(EngineContract):
    kinds: ClassVar[tuple[str, ...]] = ("llama", "qwen2", "qwen3", "mistral")
    dtype = torch.bfloat16
    slack = 0.35

    def engine(self, model: Any, tokenizer: Any, **options: Any) -> BatchedEngine:
        engine = BatchedEngine(model, tokenizer, backend="native", **options)
        assert engine.kernel.startswith("native-bf16-")
        return engine


def odd_model() -> Any:
    """Widths that fill no tile: 108 and 68 in tiles of 64, 3 heads of 32 over 1."""
    config = tf.LlamaConfig(
        vocab_size=211,
        hidden_size=108,
        intermediate_size=68,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    torch.manual_seed(5)
    model = tf.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(torch.bfloat16).eval()


def random_adapters(model: Any, shared: bool) -> list[AdapterState]:
    names = [f"model.layers.{i}.{m}" for i in range(2) for m in MODULES]
    first = tiny.adapter(model, seed=1, rank=5, names=names)
    others = [
        tiny.adapter(model, seed=s, rank=5, names=names, shared=first if shared else None)
        for s in (2, 3)
    ]
    return [first, *others]


def random_prompts(model: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    size = model.config.vocab_size
    return [torch.randint(4, size, (n,), generator=generator).tolist() for n in LENGTHS]


def trace(
    backend: NativeBackend, prompts: list[list[int]], members: list[int], steps: int = 4
) -> torch.Tensor:
    """Logits (steps + 1, rows, vocabulary) of greedy decoding."""
    session = backend.start()
    out = session.add(prompts, members, [steps + 1] * len(prompts), True)
    seen = [out.logits]
    for _ in range(steps):
        out = session.decode(out.best, True)
        seen.append(out.logits)
    return torch.stack([s for s in seen if s is not None])


def fp32_logits(model: Any, adapter: AdapterState | None, tokens: list[int]) -> torch.Tensor:
    reference = type(model)(model.config)
    reference.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    if adapter is not None:
        for name, (a, b) in adapter.factors.items():
            a, b = a.to(torch.bfloat16).float(), b.to(torch.bfloat16).float()
            reference.get_submodule(name).weight.data += adapter.scaling * b @ a
    with torch.no_grad():
        return reference.eval()(torch.tensor([tokens])).logits[0, -1]


@pytest.mark.parametrize("shared", [True, False])
def test_logits_of_odd_widths_are_near_float32(shared: bool) -> None:
    model = odd_model()
    adapters, prompts = random_adapters(model, shared), random_prompts(model)
    backend = NativeBackend(model, threads=2)
    backend.load(adapters)
    logits = trace(backend, prompts, list(MEMBERS), steps=20)
    for row, (prompt, member) in enumerate(zip(prompts, MEMBERS, strict=True)):
        tokens = list(prompt)
        for step in range(21):
            if step in (0, 1, 20):
                adapter = None if member == BASE else adapters[member]
                exact = fp32_logits(model, adapter, tokens)
                error = (logits[step, row] - exact).norm() / exact.norm()
                assert error < 0.02, (row, step)
            tokens.append(int(logits[step, row].argmax()))


@pytest.mark.parametrize("shared", [True, False])
def test_a_row_is_the_same_to_the_last_bit_whatever_its_neighbours_and_threads(
    shared: bool,
) -> None:
    model = odd_model()
    adapters, prompts = random_adapters(model, shared), random_prompts(model)
    one, two = NativeBackend(model, threads=1), NativeBackend(model, threads=2)
    for backend in (one, two):
        backend.load(adapters)
    together = trace(one, prompts, list(MEMBERS))
    assert torch.equal(trace(two, prompts, list(MEMBERS)), together)
    order = [6, 2, 8, 0, 4, 7, 1, 3, 5]
    shuffled = trace(two, [prompts[i] for i in order], [MEMBERS[i] for i in order])
    assert torch.equal(shuffled, together[:, order])
    for row in range(len(prompts)):
        alone = trace(one, [prompts[row]], [MEMBERS[row]])
        assert torch.equal(alone[:, 0], together[:, row]), row


def test_prefill_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd_model()
    backend, prompts = NativeBackend(model, threads=1), random_prompts(model)
    backend.load(random_adapters(model, True))
    whole = trace(backend, prompts, list(MEMBERS))
    monkeypatch.setattr("loralab.engines.native.session.PREFILL_ROWS", 7)
    assert torch.equal(trace(backend, prompts, list(MEMBERS)), whole)


def test_shared_prefixes_change_nothing_and_save_pages() -> None:
    model = odd_model()
    backend = NativeBackend(model, threads=1)
    backend.load(random_adapters(model, True))
    head, *tails = random_prompts(model)
    prompts = [head * 8 + tail for tail in tails]
    members = [m for m in (0, 1, BASE) for _ in prompts]
    apart = torch.cat(
        [trace(backend, [p], [m]) for m, p in zip(members, prompts * 3, strict=True)], 1
    )
    assert torch.equal(trace(backend, prompts * 3, members), apart)
    pool = PagePool(backend.page_bytes)
    for member in (0, 1):
        pages: list[int] = []
        assert pool.take_prefix(member, prompts[0], pages) == 0
        again: list[int] = []
        assert pool.take_prefix(member, prompts[1], again) == len(head) * 8 // PAGE * PAGE
        assert again[:2] == pages[:2]
        assert again[-1] not in pages


def test_rows_may_join_and_leave_while_others_decode() -> None:
    model = odd_model()
    backend, prompts = NativeBackend(model, threads=1), random_prompts(model)
    backend.load(random_adapters(model, False))
    expected = trace(backend, prompts, list(MEMBERS), steps=6)
    session = backend.start()
    first = session.add(prompts[:5], MEMBERS[:5], [7] * 5, True)
    second = session.decode(first.best, True)
    session.keep([0, 2, 4])
    joined = session.add(prompts[5:], MEMBERS[5:], [7] * 4, True)
    assert second.logits is not None
    assert joined.logits is not None
    assert torch.equal(second.logits, expected[1, :5])
    assert torch.equal(joined.logits, expected[0, 5:])
    out = session.decode(torch.cat([second.best[[0, 2, 4]], joined.best]), True)
    assert out.logits is not None
    assert torch.equal(out.logits, torch.cat([expected[2, [0, 2, 4]], expected[1, 5:]]))


def test_what_lies_in_unused_memory_never_reaches_a_row() -> None:
    model = odd_model()
    backend, prompts = NativeBackend(model, threads=1), random_prompts(model)
    backend.load(random_adapters(model, True))
    expected = trace(backend, prompts, list(MEMBERS))
    pool, layers = backend.pool, 2
    page_of_layer = backend.page_bytes // layers
    for layer in range(layers):  # every bit set is NaN in bf16
        start, size = layer * pool.capacity * page_of_layer, 64 * page_of_layer
        pool._memory[start : start + size] = b"\xff" * size
    assert torch.equal(trace(backend, prompts, list(MEMBERS)), expected)


def test_pages_go_back_when_their_last_row_leaves() -> None:
    pool = PagePool(64)
    a, b = [], []
    tokens = list(range(40))
    pool.take_prefix(0, tokens, a)
    assert pool.take_prefix(0, tokens, b) == 32
    pool.release(a)
    c: list[int] = []
    assert pool.take_prefix(0, tokens, c) == 32, "b still holds the shared pages"
    pool.release(b)
    pool.release(c)
    d: list[int] = []
    assert pool.take_prefix(0, tokens, d) == 0, "nothing is known any more"
    assert set(d) <= {*a, *b, *c}, "pages are used again"


def test_argmax_takes_the_first_of_equals_and_logits_agree() -> None:
    model = odd_model()
    with torch.no_grad():
        head = model.lm_head.weight
        head[100:] = head[:111].clone()
    backend = NativeBackend(model, threads=2)
    session = backend.start()
    out = session.add(random_prompts(model), [BASE] * len(LENGTHS), [2] * len(LENGTHS), True)
    assert out.logits is not None
    assert (out.best < 100).any()
    for best, row in zip(out.best.tolist(), out.logits, strict=True):
        assert best == int((row == row.max()).nonzero()[0])


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-march=x86-64", "-march=x86-64-v3", "-march=x86-64-v4"])
def test_kernels_for_lesser_processors_agree(flag: str, tmp_path: Path) -> None:
    if "x86-64-v4" in flag and "avx512bw" not in build._processor():
        pytest.skip("this processor has no AVX-512")
    if "x86" not in build.platform.machine():
        pytest.skip("the flags are for x86-64")
    target = tmp_path / "decoder.so"
    build.compile_library(build.find_compiler(), target, flag)
    lib = build.declare(ctypes.CDLL(str(target)))
    model = odd_model()
    prompts = random_prompts(model)
    best, lesser = NativeBackend(model, threads=1), NativeBackend(model, threads=1, lib=lib)
    assert best.name != lesser.name or "avx512bf16" not in best.name
    for backend in (best, lesser):
        backend.load(random_adapters(model, True))
    a, b = trace(best, prompts, list(MEMBERS), 0), trace(lesser, prompts, list(MEMBERS), 0)
    # Two correct bf16 kernels differ by roundings of the activations alone.
    assert ((a - b).norm(dim=-1) / a.norm(dim=-1)).max() < 0.01
    rows = torch.equal(trace(lesser, prompts[3:4], [MEMBERS[3]], 0)[:, 0], b[:, 3])
    assert rows, "a row depends on its neighbours"


def test_what_it_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd_model()
    assert NativeBackend.supports(model) is None
    assert "float32" in str(NativeBackend.supports(tiny.model("llama")))
    assert "gpt2" in str(NativeBackend.supports(tiny.model("gpt2", torch.bfloat16)))
    assert "gemma3" in str(NativeBackend.supports(tiny.model("gemma3", torch.bfloat16)))
    model.config.hidden_act = "gelu"
    assert "gelu" in str(NativeBackend.supports(model))
    backend = NativeBackend(odd_model())
    wrong = tiny.adapter(odd_model(), seed=0, names=["model.embed_tokens"])
    with pytest.raises(UserError, match=r"cannot adapt .*embed_tokens"):
        backend.load([wrong])


def test_no_compiler_is_a_reason_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    try:
        reason = NativeBackend.supports(odd_model())
        assert "no C++ compiler" in str(reason)
        engine = BatchedEngine(tiny.model("llama", torch.bfloat16), tiny.tokenizer())
        assert not engine.kernel.startswith("native")
    finally:
        build.library.cache_clear()
