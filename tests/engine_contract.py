"""What every backend of the batched engine must do. Subclass `EngineContract` to run it on one.

    class TestNative(EngineContract):
        kinds = ("llama",)
        dtype = torch.bfloat16

        def engine(self, model, tokenizer, **options):
            return BatchedEngine(model, tokenizer, backend="native", **options)

In float32 the engine's greedy tokens are compared with `generate()` of the PEFT model, token for
token. In bf16 no two kernels agree token for token: there every chosen token must be within
`slack` of the best float32 logit.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch

import tiny
from loralab.adapters.state import AdapterState, Factors
from loralab.engines.base import Completion, Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.errors import UserError

LENGTHS = (3, 17, 8, 12)


class Case:
    """A model, its adapters, the engine under test and the PEFT reference."""

    def __init__(self, contract: EngineContract, kind: str) -> None:
        self.contract = contract
        self.model = tiny.model(kind, contract.dtype)
        self.tokenizer = tiny.tokenizer()
        self.adapters = {
            f"m{index}": tiny.adapter(self.model, seed=10 + index) for index in range(5)
        }
        self.prompts = [tiny.words(n, seed=n) for n in LENGTHS]
        self._reference: tiny.PeftReference | None = None

    @property
    def reference(self) -> tiny.PeftReference:
        """PEFT in float32."""
        if self._reference is None:
            model = tiny.model(self.model.config.model_type.removesuffix("_text"))
            model.load_state_dict({k: v.float() for k, v in self.model.state_dict().items()})
            model.generation_config = self.model.generation_config
            self._reference = tiny.PeftReference(model, self.adapters)
        return self._reference

    def engine(self, **options: Any) -> BatchedEngine:
        made = self.contract.engine(self.model, self.tokenizer, **options)
        made.load(self.adapters)
        return made

    def ids(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt)["input_ids"])

    def requests(self, **sampling: Any) -> list[Request]:
        settings = Sampling(**({"max_new_tokens": 16} | sampling))
        names = [*self.adapters, None]
        return [Request(prompt, name, settings) for name in names for prompt in self.prompts]

    def check(self, requests: list[Request], completions: list[Completion]) -> None:
        """Every completion is the greedy one."""
        for request, completion in zip(requests, completions, strict=True):
            prompt = self.ids(str(request.prompt))
            assert completion.error is None
            if self.contract.dtype == torch.float32:
                expected = self.reference.greedy(
                    request.adapter, prompt, request.sampling.max_new_tokens
                )
                assert completion.tokens == expected
            else:
                logits = self.reference.logits(request.adapter, [*prompt, *completion.tokens])
                steps = logits[len(prompt) - 1 : -1]
                chosen = steps.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
                assert float((steps.max(-1).values - chosen).max()) < self.contract.slack
            ended = completion.tokens[-1] in self.contract.ends(self.model)
            assert completion.finish_reason == ("stop" if ended else "length")
            kept = completion.tokens[:-1] if ended else completion.tokens
            assert completion.text == self.tokenizer.decode(kept, skip_special_tokens=True)


class EngineContract:
    """Override `kinds`, `dtype`, `slack` and `engine`."""

    kinds: ClassVar[tuple[str, ...]] = tuple(tiny.CONFIGS)
    dtype: ClassVar[torch.dtype] = torch.float32
    slack: ClassVar[float] = 0.0

    def engine(self, model: Any, tokenizer: Any, **options: Any) -> BatchedEngine:
        raise NotImplementedError

    @staticmethod
    def ends(model: Any) -> list[int]:
        eos = model.generation_config.eos_token_id
        return [*(eos if isinstance(eos, list) else [eos]), tiny.EOS]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        cls = metafunc.cls
        assert cls is not None
        if "every_case" in metafunc.fixturenames:
            metafunc.parametrize("every_case", cls.kinds, indirect=True)

    @pytest.fixture
    def every_case(self, request: pytest.FixtureRequest) -> Case:
        return Case(self, request.param)

    @pytest.fixture
    def case(self) -> Case:
        return Case(self, self.kinds[0])

    def test_greedy_tokens_are_those_of_peft(self, every_case: Case) -> None:
        requests = every_case.requests()
        every_case.check(requests, every_case.engine().generate(requests))

    def test_rows_that_end_early_leave_the_others_alone(self, every_case: Case) -> None:
        engine, requests = every_case.engine(), every_case.requests(max_new_tokens=20)
        plain = engine.generate(requests)

        def lengths(ends: set[int]) -> set[int]:
            cut = ([i for i, t in enumerate(c.tokens) if t in ends][:1] for c in plain)
            return {place[0] if place else -1 for place in cut}

        # End tokens that make rows drop out at as many different steps as possible.
        ends: set[int] = set()
        for _ in range(4):
            ends.add(max(range(tiny.VOCABULARY), key=lambda t: len(lengths(ends | {t}))))
        every_case.model.generation_config.eos_token_id = [*ends, tiny.EOS]
        completions = every_case.engine().generate(requests)
        every_case.check(requests, completions)
        assert len({len(c.tokens) for c in completions}) > 4, "the test needs many lengths"

    def test_members_that_share_a_are_the_same_as_members_that_do_not(
        self, every_case: Case
    ) -> None:
        first = every_case.adapters["m0"]
        every_case.adapters = {
            f"m{index}": tiny.adapter(every_case.model, seed=30 + index, shared=first)
            for index in range(6)
        }
        requests = every_case.requests()
        every_case.check(requests, every_case.engine().generate(requests))

    def test_members_may_differ_in_scaling_and_rank(self, case: Case) -> None:
        case.adapters = {
            f"m{rank}": tiny.adapter(case.model, seed=rank, rank=rank, scaling=0.3 + rank / 4)
            for rank in (1, 2, 5)
        }
        requests = case.requests()
        case.check(requests, case.engine().generate(requests))

    def test_members_may_leave_modules_alone(self, case: Case) -> None:
        names = tiny.linear_names(case.model)
        zero = tiny.adapter(case.model, seed=2)
        part = tiny.adapter(case.model, seed=1, names=names[::2])
        # PEFT's model needs every module: zeros stand for those the member does not name.
        full = {
            n: part.factors.get(n, Factors(f.A, torch.zeros_like(f.B)))
            for n, f in zero.factors.items()
        }
        engine = case.engine()
        case.adapters = {"part": AdapterState(full, part.scaling), "other": zero}
        engine.load({"part": part, "other": zero})
        requests = case.requests()
        case.check(requests, engine.generate(requests))

    def test_requests_may_come_in_any_order_and_number(self, case: Case) -> None:
        engine, requests = case.engine(), case.requests()
        order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(3)).tolist()
        mixed = [requests[i] for i in order] + requests[:3] + [requests[7]] * 2
        case.check(mixed, engine.generate(mixed))
        case.check(requests[9:10], engine.generate(requests[9:10]))
        assert engine.generate([]) == []

    def test_loading_replaces_what_was_loaded(self, case: Case) -> None:
        engine, requests = case.engine(), case.requests()
        engine.generate(requests)
        case.adapters = {
            name: tiny.adapter(case.model, seed=50 + index)
            for index, name in enumerate(case.adapters)
        }
        engine.load(case.adapters)
        case.check(requests, engine.generate(requests))
        engine.load({})
        with pytest.raises(UserError, match="'m0' is not loaded"):
            engine.generate(requests)

    def test_little_memory_gives_the_same_text(self, case: Case) -> None:
        engine, requests = case.engine(), case.requests()
        plain = engine.generate(requests)
        row = engine.backend.row_bytes(17 + 1 + 16) + 4 * tiny.VOCABULARY
        small = case.engine(memory_gb=3.5 * row / 1e9)
        calls: list[tuple[int, int]] = []
        waves = small.generate(requests, lambda done, total: calls.append((done, total)))
        if self.dtype == torch.float32:
            assert waves == plain
        case.check(requests, waves)
        assert calls[-1] == (len(requests), len(requests))
        finished = [0] + [done for done, _ in calls]
        steps = [after - before for before, after in pairwise(finished)]
        # At most 3 rows of the longest kind fit, and 6 of the shortest.
        assert all(0 < step <= 6 for step in steps)

    def test_no_memory_for_a_row_is_its_own_error(self, case: Case) -> None:
        engine = case.engine(memory_gb=1e-9)
        completion = engine.generate([Request(case.prompts[0], "m1")])[0]
        assert completion.finish_reason == "error"
        assert "memory_gb" in str(completion.error)
        assert "'m1'" in str(completion.error)

    def test_sampled_text_does_not_depend_on_neighbours(self, case: Case) -> None:
        engine = case.engine()
        requests = [
            Request(r.prompt, r.adapter, Sampling(12, temperature=1.2, top_k=k, top_p=p, seed=i))
            for i, r in enumerate(case.requests())
            for k, p in ((0, 1.0), (9, 1.0), (0, 0.8))
        ]
        together = engine.generate(requests)
        assert len({c.tokens for c in together}) > len(requests) // 2
        for index in range(0, len(requests), 7):
            assert engine.generate([requests[index]]) == [together[index]]
        backward = engine.generate(requests[::-1])
        assert backward[::-1] == together

    def test_greedy_and_sampled_rows_share_a_batch(self, case: Case) -> None:
        engine, greedy = case.engine(), case.requests()
        drawn = case.requests(temperature=1.0, seed=5)
        mixed = engine.generate([r for pair in zip(greedy, drawn, strict=True) for r in pair])
        case.check(greedy, mixed[::2])
        assert mixed[1::2] != mixed[::2]

    def test_stop_strings_end_the_text_before_them(self, case: Case) -> None:
        engine, requests = case.engine(), case.requests()
        plain = engine.generate(requests)
        for request, whole in zip(requests, plain, strict=True):
            text = whole.text
            if len(text) < 8:
                continue  # it ended by itself before there was anything to stop at
            # Three letters from an odd place: they cross the border of two-letter tokens.
            stop = text[5:8]
            stopped = Sampling(16, stop=("never", stop))
            completion = engine.generate([Request(request.prompt, request.adapter, stopped)])[0]
            assert completion.finish_reason == "stop"
            assert completion.text == text[: text.index(stop)]
            assert stop not in completion.text
            if self.dtype == torch.float32:
                # It ends with the very token that completes the stop string.
                assert completion.tokens == whole.tokens[: len(completion.tokens)]
                before = case.tokenizer.decode(completion.tokens[:-1], skip_special_tokens=True)
                assert stop not in before

    def test_a_member_with_nan_fails_alone(self, case: Case) -> None:
        engine, requests = case.engine(), case.requests()
        plain = engine.generate(requests)
        sick = case.adapters["m2"]
        name = list(sick.factors)[-1]
        broken = {**sick.factors, name: Factors(*(t.clone() for t in sick.factors[name]))}
        broken[name].B[1, 1] = float("nan")
        engine.load({**case.adapters, "m2": AdapterState(broken, sick.scaling)})
        for request, before, after in zip(requests, plain, engine.generate(requests), strict=True):
            if request.adapter == "m2":
                assert after.finish_reason == "error"
                assert "'m2'" in str(after.error)
                assert "NaN" in str(after.error)
            else:
                assert after == before

    def test_prompts_it_cannot_run_are_errors_of_their_own(self, case: Case) -> None:
        engine = case.engine()
        long = tiny.words(95, seed=1)
        limit = case.model.config.max_position_embeddings
        requests = [
            Request(case.prompts[0], "m0"),
            Request(tiny.words(limit, seed=1), "m3"),
            Request(long, "m1"),
            Request("", "m0", Sampling(4)),
        ]
        first, too_long, nearly, empty = engine.generate(requests)
        assert first.error is None
        assert too_long.finish_reason == "error"
        assert f"{limit + 1} tokens" in str(too_long.error)
        assert "'m3'" in str(too_long.error)
        assert nearly.finish_reason == "error", "96 tokens leave no room for one more"
        # An empty prompt is the beginning of a sequence.
        assert empty == engine.generate([Request("<bos>", "m0", Sampling(4))])[0]
        almost = engine.generate([Request(tiny.words(92, seed=1), "m1", Sampling(40))])[0]
        assert almost.finish_reason == "length"
        assert len(almost.tokens) == limit - 93

    def test_messages_go_through_the_chat_template(self, case: Case) -> None:
        engine = case.engine()
        messages = [{"role": "user", "content": "ab cd"}]
        chat = engine.generate([Request(messages, "m1")])
        assert chat == engine.generate([Request("ab cd ha", "m1")])
        assert chat == engine.generate([Request("<bos> ab cd ha", "m1")])

    def test_the_model_is_left_as_it_was(self, every_case: Case) -> None:
        model = every_case.model
        tokens = torch.tensor([every_case.ids(every_case.prompts[1])])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
        attention = model.config._attn_implementation
        requests = every_case.requests()
        plain = every_case.engine().generate(requests)
        model.train()
        torch.manual_seed(0)
        logits = model(tokens).logits
        # Dropout is off while the engine runs (GPT-2 has some), and back on after.
        assert every_case.engine().generate(requests) == plain
        assert model.config._attn_implementation == attention
        assert all(module.training for module in model.modules())
        torch.manual_seed(0)
        assert torch.equal(model(tokens).logits, logits)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert attributes == {name: set(m.__dict__) for name, m in model.named_modules()}

    def test_the_base_moves_and_comes_back_exactly(self, case: Case) -> None:
        engine, requests = case.engine(), case.requests()
        plain = engine.generate(requests)
        before = {name: value.clone() for name, value in case.model.state_dict().items()}
        generator = torch.Generator().manual_seed(4)
        names = tiny.linear_names(case.model)[:3]
        modules = dict(case.model.named_modules())
        changes = {}
        for name in names:
            state = case.adapters["m0"].factors[name]
            shape = (state.B.shape[0], state.A.shape[1])
            changes[name] = 0.05 * torch.randn(shape, generator=generator)
        for _ in range(3):
            engine.set_base(changes)
        for name in names:
            true = before[f"{name}.weight"]
            change = changes[name]
            expected = true.float() + (change if change.shape == true.shape else change.t())
            assert torch.equal(modules[name].weight, expected.to(true.dtype))
        moved = engine.generate(requests)
        assert moved != plain
        case.check(requests, moved)
        engine.set_base({names[0]: changes[names[0]]})
        engine.set_base({})
        assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())
        assert engine.generate(requests) == plain
