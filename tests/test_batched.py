"""The batched engine beyond its contract: rounding, layouts, prompts, what users get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
from engine_contract import Case, EngineContract
from loralab.adapters.state import AdapterState, Factors
from loralab.engines import torch_session
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.engines.lora_linear import Routing, delta, patched, stack
from loralab.engines.memory import available_memory, cache_budget
from loralab.engines.torch_backend import TorchBackend
from loralab.errors import UserError


class TorchContract(EngineContract):
    def engine(self, model: Any, tokenizer: Any, **options: Any) -> BatchedEngine:
        return BatchedEngine(model, tokenizer, backend="torch", threads=1, **options)


def case(kind: str = "llama") -> Case:
    return Case(TorchContract(), kind)


def random_stack(
    members: int, shared: bool, scalings: list[float], dtype: torch.dtype
) -> tuple[list[Factors], Any]:
    generator = torch.Generator().manual_seed(members)
    one = torch.randn(3, 16, generator=generator)
    pairs = [
        Factors(
            one if shared else torch.randn(3, 16, generator=generator),
            torch.randn(24, 3, generator=generator),
        )
        for _ in range(members)
    ]
    return pairs, stack(pairs, scalings, torch.empty(24, 16, dtype=dtype))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scalings", [[2.0] * 9, [0.3] * 9, [0.1 * i for i in range(9)]])
@pytest.mark.parametrize(
    "members",
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 0, 1, 1, 2, 2],
        [3, 3, 4, 4],
        [0, 8, 8, 0],
        [-1, 5, -1, 2, 5, 5],
        [8, 1, -1],
        [7],
    ],
)
def test_delta_is_each_rows_own(members: list[int], scalings: list[float], shared: bool) -> None:
    pairs, stacked = random_stack(9, shared, scalings, torch.float32)
    routing = Routing.of(members, torch.device("cpu"))
    assert routing is not None
    x = torch.randn(len(members), 4, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        got = delta(x, stacked, routing)
        for row, member in enumerate(members):
            expected = torch.zeros(4, 24)
            if member >= 0:
                expected = scalings[member] * x[row] @ pairs[member].A.t() @ pairs[member].B.t()
            assert torch.allclose(got[row], expected, atol=1e-5)


def test_a_nan_in_one_member_stays_there() -> None:
    _, stacked = random_stack(9, False, [0.5] * 9, torch.float32)
    stacked.up[5] = float("nan")
    members = [5, 0, -1, 6, 5, 6, 6]
    routing = Routing.of(members, torch.device("cpu"))
    assert routing is not None
    got = delta(torch.randn(7, 2, 16), stacked, routing)
    assert [bool(row.isnan().any()) for row in got] == [m == 5 for m in members]


@pytest.mark.parametrize("conv", [False, True])
def test_bf16_keeps_deltas_under_half_an_ulp(conv: bool) -> None:
    """The mean over many entries moves by the delta; rounding x W^T first moves nothing."""
    generator = torch.Generator().manual_seed(0)
    module: Any = Conv1D(256, 128) if conv else nn.Linear(128, 256, bias=False)
    module.to(torch.bfloat16)
    x = torch.randn(32, 8, 128, generator=generator).bfloat16()
    pairs = [
        Factors(
            torch.randn(4, 128, generator=generator).bfloat16() / 11,
            (torch.randn(256, 4, generator=generator) * 3e-5).bfloat16(),
        )
        for _ in range(32)
    ]
    targets = {"m": (module, stack(pairs, [1.0] * 32, torch.empty(1, dtype=torch.bfloat16)))}
    plain = module(x).detach()
    routing = Routing.of(range(32), x.device)
    with torch.no_grad(), patched(targets, routing):
        ours = module(x)
    assert "forward" not in module.__dict__
    true = torch.stack(
        [x[i].float() @ pairs[i].A.float().t() @ pairs[i].B.float().t() for i in range(32)]
    )
    ulp = plain.float().abs() * 2**-8
    small = (true.abs() < 0.4 * ulp) & (plain.float().abs() > 0.01)
    assert float(small.float().mean()) > 0.8

    def slope(moved: torch.Tensor) -> float:
        change = (moved.float() - plain.float())[small]
        return float((change * true[small]).sum() / (true[small] ** 2).sum())

    assert slope(ours) == pytest.approx(1, abs=0.15)
    assert abs(slope(plain + true.bfloat16())) < 0.1


def test_bf16_is_nearer_to_fp32_than_peft() -> None:
    """Mean error of the logits of a bf16 model against the same weights in float32."""
    ours = theirs = 0.0
    for seed in range(4):
        model = tiny.model("llama", torch.bfloat16, seed=seed)
        adapters = {
            f"m{i}": tiny.adapter(model, seed=10 * seed + i, size=0.02, scaling=1.0)
            for i in range(4)
        }
        adapters = {
            name: AdapterState(
                {n: Factors(a.bfloat16(), b.bfloat16()) for n, (a, b) in state.factors.items()},
                state.scaling,
            )
            for name, state in adapters.items()
        }
        exact = tiny.PeftReference(tiny.model("llama", seed=seed).float(), adapters)
        exact.model.load_state_dict(
            {name: value.bfloat16().float() for name, value in exact.model.state_dict().items()}
        )
        rounded = tiny.PeftReference(model, adapters)
        rounded.model.to(torch.bfloat16)
        prompts = [
            torch.randint(3, tiny.VOCABULARY, (20,), generator=torch.Generator().manual_seed(s))
            for s in range(6)
        ]
        backend = TorchBackend(model)
        backend.load(list(adapters.values()))
        rows = [p.tolist() for _ in adapters for p in prompts]
        members = [m for m in range(len(adapters)) for _ in prompts]
        output = backend.start().add(rows, members, [1] * len(rows), True)
        assert output.logits is not None
        for row, tokens in enumerate(rows):
            name = f"m{members[row]}"
            true = exact.logits(name, tokens)[-1]
            ours += float((output.logits[row] - true).abs().mean())
            theirs += float((rounded.logits(name, tokens)[-1] - true).abs().mean())
    assert ours < theirs


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_a_shared_prefix_is_run_once_per_member(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(kind)
    prefix = tiny.words(30, seed=100)
    made.prompts = [f"{prefix} {tiny.words(n, seed=n)}" for n in (1, 4, 9)]
    requests = made.requests()
    tokens: list[int] = []
    forward = TorchBackend.forward
    monkeypatch.setattr(
        TorchBackend,
        "forward",
        lambda self, ids, *rest: (tokens.append(ids.numel()), forward(self, ids, *rest))[1],
    )
    for fixed in (False, True):
        engine = made.engine()
        engine.backend.fixed = fixed
        tokens.clear()
        made.check(requests, engine.generate(requests))
        prefill = sum(count for count in tokens if count > len(requests))
        whole = len(requests) * 40
        # A sliding window counts columns: there every row runs its own prefix.
        assert (prefill < whole / 2) == (kind != "mistral")
    made.prompts = [prefix] * 3
    requests = made.requests()
    made.check(requests, made.engine().generate(requests))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "mistral"])
def test_prefill_in_small_pieces_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(kind)
    monkeypatch.setitem(torch_session._PREFILL_TOKENS, "cpu", 40)
    requests = made.requests()
    made.check(requests, made.engine().generate(requests))
    prefix = tiny.words(30, seed=100)
    made.prompts = [f"{prefix} {tiny.words(n, seed=n)}" for n in (1, 4, 9)]
    requests = made.requests()
    made.check(requests, made.engine().generate(requests))


@pytest.mark.parametrize("fixed", [False, True])
def test_columns_never_written_are_never_felt(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """New buffers hold NaN here, as memory that was used before may."""
    made = case("llama")
    monkeypatch.setitem(torch_session._PREFILL_TOKENS, "cpu", 40)
    requests = made.requests()
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(3).isnan().all())
        engine = made.engine()
        engine.backend.fixed = fixed
        completions = engine.generate(requests)
    finally:
        torch.use_deterministic_algorithms(False)
    made.check(requests, completions)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_attention_implementations_keep_theirs(attention: str) -> None:
    made = case("llama")
    made.model.set_attn_implementation(attention)
    requests = made.requests()
    made.check(requests, made.engine().generate(requests))
    assert made.model.config._attn_implementation == attention


def test_adapters_on_the_output_head() -> None:
    made = case("llama")
    names = [tiny.linear_names(made.model)[3], "lm_head"]
    made.adapters = {
        f"m{i}": tiny.adapter(made.model, seed=i, names=names, size=0.5) for i in range(4)
    }
    requests = made.requests()
    made.check(requests, made.engine().generate(requests))


def test_a_failing_forward_leaves_the_model_whole() -> None:
    made = case("llama")
    engine = made.engine()
    attributes = {name: set(m.__dict__) for name, m in made.model.named_modules()}
    mlp = made.model.model.layers[1].mlp
    forward = type(mlp).forward

    def broken(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of luck")

    type(mlp).forward = broken
    try:
        with pytest.raises(RuntimeError, match="out of luck"):
            engine.generate(made.requests())
    finally:
        type(mlp).forward = forward
    assert made.model.config._attn_implementation == "sdpa"
    assert attributes == {name: set(m.__dict__) for name, m in made.model.named_modules()}
    requests = made.requests()
    made.check(requests, engine.generate(requests))


def test_finished_rows_are_squeezed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = TorchBackend.forward
    monkeypatch.setattr(
        TorchBackend,
        "forward",
        lambda self, ids, *rest: (sizes.append(ids.shape[0]), forward(self, ids, *rest))[1],
    )
    made = case("llama")
    names = [*made.adapters, None]
    requests = [
        Request(prompt, name, Sampling(2 + 5 * place))
        for name in names
        for place, prompt in enumerate(made.prompts)
    ]
    for fixed in (False, True):
        engine = made.engine()
        engine.backend.fixed = fixed
        sizes.clear()
        made.check(requests, engine.generate(requests))
        assert sizes[0] == 24
        assert sizes[-1] <= 6
        assert len(set(sizes)) > 2


def test_stop_strings_that_are_special_tokens() -> None:
    made = case("llama")
    engine = made.engine()
    request = Request(made.prompts[1], "m0", Sampling(30))
    plain = engine.generate([request])[0]
    special = made.tokenizer.convert_ids_to_tokens(plain.tokens[4])
    made.tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    stopped = Request(request.prompt, "m0", Sampling(30, stop=(special,)))
    completion = made.engine().generate([stopped])[0]
    assert completion.finish_reason == "stop"
    assert completion.tokens == plain.tokens[: plain.tokens.index(plain.tokens[4]) + 1]


def test_text_prompts_keep_one_beginning_and_no_end() -> None:
    from loralab.engines.prompts import PromptEncoder

    tokenizer = tiny.tokenizer()
    plain = PromptEncoder(tokenizer).encode("ab cd")
    assert plain[0] == tiny.BOS
    assert len(plain) == 3
    assert PromptEncoder(tokenizer).encode("<bos> ab cd") == plain
    assert PromptEncoder(tokenizer).encode("") == [tiny.BOS]
    assert PromptEncoder(tokenizer).encode("ab <eos>")[-1] == tiny.EOS
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", tiny.BOS), ("<eos>", tiny.EOS)]
    )
    assert tokenizer("ab cd")["input_ids"][-1] == tiny.EOS
    assert PromptEncoder(tokenizer).encode("ab cd") == plain
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert PromptEncoder(tokenizer).encode("ab cd") == plain[1:]
    assert PromptEncoder(tokenizer).encode("") == [tiny.BOS]
    tokenizer.bos_token = None
    assert PromptEncoder(tokenizer).encode("") == []
    assistant = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "cd"},
    ]
    tokenizer = tiny.tokenizer()
    assert PromptEncoder(tokenizer).encode(assistant) == PromptEncoder(tokenizer).encode("ab cd")


def test_an_empty_prompt_without_a_beginning_token_is_an_error() -> None:
    made = case("llama")
    made.tokenizer.bos_token = None
    from tokenizers.processors import TemplateProcessing

    made.tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    completion = made.engine().generate([Request("", "m4")])[0]
    assert completion.finish_reason == "error"
    assert "'m4'" in str(completion.error)
    assert "empty" in str(completion.error)


def test_messages_without_a_template_are_a_users_error() -> None:
    made = case("llama")
    made.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        made.engine().generate([Request([{"role": "user", "content": "ab"}])])


def test_adapters_it_cannot_run_are_a_users_error() -> None:
    made = case("llama")
    engine, state = made.engine(), made.adapters["m0"]
    with pytest.raises(UserError, match="'s' is of kind 'sine'"):
        engine.load({"s": AdapterState(state.factors, 1.0, kind="sine")})
    name, (a, b) = next(iter(state.factors.items()))
    for wrong, match in (
        ({"model.nowhere": Factors(a, b)}, "lacks"),
        ({name: Factors(a[:, 1:], b)}, "expected A"),
        ({name: Factors(a, b[1:])}, "expected A"),
        ({name: Factors(a, b[:, 1:])}, "expected A"),
        ({"model.embed_tokens": Factors(a, b)}, "Embedding"),
    ):
        with pytest.raises(UserError, match=match):
            engine.load({"w": AdapterState(wrong, 1.0)})
    with pytest.raises(UserError, match="'w' is not loaded"):
        engine.generate([Request("ab", "w")])


def test_base_changes_it_cannot_make_are_a_users_error() -> None:
    made = case("llama")
    engine = made.engine()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    name = tiny.linear_names(made.model)[0]
    good = torch.ones_like(made.model.get_submodule(name).weight)
    made.model.lm_head.weight = made.model.model.embed_tokens.weight
    before["lm_head.weight"] = before["model.embed_tokens.weight"]
    for wrong, match in (
        ({name: good[1:]}, "expected"),
        ({"model.norm": good[0]}, "RMSNorm"),
        ({"nowhere": good}, "no module"),
    ):
        with pytest.raises(UserError, match=match):
            engine.set_base({name: good} | wrong)
    tied = BatchedEngine(made.model, made.tokenizer, backend="torch")
    with pytest.raises(UserError, match="shares its weight"):
        tied.set_base({name: good, "lm_head": made.model.lm_head.weight})
    assert all(torch.equal(before[k], v) for k, v in made.model.state_dict().items())


def test_models_without_key_value_attention_are_a_users_error() -> None:
    from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    with pytest.raises(UserError, match=r"Mamba|mamba"):
        TorchBackend(MambaForCausalLM(MambaConfig(**small, state_size=4)))
    t5 = T5Config(vocab_size=32, d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)
    with pytest.raises(UserError, match="encoder-decoder"):
        TorchBackend(T5ForConditionalGeneration(t5))


def test_backends_by_name() -> None:
    made = case("llama")
    assert made.engine().kernel == "torch-cpu-float32"
    with pytest.raises(UserError, match="choose auto, native or torch"):
        BatchedEngine(made.model, made.tokenizer, backend="fast")  # type: ignore[arg-type]
    gpt2 = tiny.model("gpt2")
    with pytest.raises(UserError, match="native backend cannot run"):
        BatchedEngine(gpt2, made.tokenizer, backend="native")
    assert BatchedEngine(gpt2, made.tokenizer).kernel == "torch-cpu-float32"


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    made = case("llama")
    seen: list[int] = []
    engine = BatchedEngine(made.model, made.tokenizer, backend="torch", threads=before + 1)
    engine.generate([Request("ab")], lambda *_: seen.append(torch.get_num_threads()))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_memory_budget() -> None:
    cpu = torch.device("cpu")
    assert cache_budget(cpu, 1.5) == 1_500_000_000
    free = available_memory()
    assert 10**8 < free < 10**14
    assert 0.3 * free < cache_budget(cpu, None) < 0.7 * free
    backend = TorchBackend(tiny.model("llama"))
    # 2 layers x (keys and values) x 2 heads x 16 values x 4 bytes.
    assert backend.row_bytes(7) == 7 * 2 * 2 * 2 * 16 * 4
