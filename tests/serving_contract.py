"""What every engine must do, written against `Engine` alone. Subclass `ServingContract` to run it.

    class TestVllm(ServingContract):
        gives_tokens = True

        @pytest.fixture(scope="class")
        @classmethod
        def subject(cls):
            engine = VllmEngine(...)
            yield Subject(engine, adapters, prompts, ending=Request(...), context=2048)
            engine.close()

The engine lives as long as the class: each test loads what it needs and leaves the rest alone.
Text is compared with the engine's own text elsewhere in the batch, and with `reference`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import tiny
from loralab.adapters.state import AdapterState, Factors
from loralab.engines.base import Completion, Engine, Request, Sampling
from loralab.errors import UserError

TOKENS = 12
"""New tokens of most requests: each subject's context holds four times as many."""


@dataclass(frozen=True)
class Subject:
    """An engine over some model, and what to ask it.

    adapters: four at least, whose texts differ from each other's and the base's; more than the
        engine holds at once, if it has a limit. {} where it loads none.
    prompts: four at least, each answered with several tokens.
    ending: a request that the model ends by itself, with one of `ends`.
    context: of the model, in tokens.
    word: text that is at least one token each time it is repeated.
    begins: what an empty prompt is taken for (the tokenizer's BOS); None: it is an error.
    reference: an engine with the same arithmetic, loaded with the same adapters.
    """

    engine: Engine
    adapters: Mapping[str, AdapterState]
    prompts: Sequence[str]
    ending: Request
    ends: frozenset[int]
    context: int
    word: str = "ab "
    begins: str | None = None
    reference: Engine | None = None

    def requests(self, tokens: int = TOKENS, **sampling: Any) -> list[Request]:
        """Every prompt under the base and under every member, in a mixed order."""
        settings = Sampling(tokens, **sampling)
        made = [Request(p, name, settings) for name in (None, *self.adapters) for p in self.prompts]
        order = torch.randperm(len(made), generator=torch.Generator().manual_seed(5)).tolist()
        return [made[i] for i in order]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """As the engine, after loading the subject's adapters."""
        self.engine.load(self.adapters)
        return self.engine.generate(requests)

    def texts(self, requests: Sequence[Request]) -> list[str]:
        """Texts of completions that must be free of errors."""
        return texts(self.generate(requests))


def texts(completions: Sequence[Completion]) -> list[str]:
    """Texts of completions that must be free of errors."""
    assert [c.error for c in completions] == [None] * len(completions)
    return [c.text for c in completions]


def tiny_adapters(model: Any, count: int = 5) -> dict[str, AdapterState]:
    """Random members, large enough that each writes its own text.

    Their scaling is a power of two: an engine may fold it into B in bf16 without rounding.
    """
    return {f"m{i}": tiny.adapter(model, seed=10 + i, scaling=2.0) for i in range(count)}


def tiny_prompts() -> list[str]:
    """Prompts of unlike lengths for the tiny tokenizer."""
    return [tiny.words(length, seed=length) for length in (3, 17, 8, 12)]


def ending_request(engine: Engine, ends: frozenset[int]) -> Request:
    """A base request that a tiny model ends by itself, found by sampling at many seeds."""
    hot = [
        Request(tiny.words(4, seed), None, Sampling(40, temperature=1.5, seed=seed))
        for seed in range(24)
    ]
    for request, done in zip(hot, engine.generate(hot), strict=True):
        if len(done.tokens) > 2 and done.tokens[-1] in ends:
            return request
    raise AssertionError("no seed of 24 ends by itself: try others")


def changed(state: AdapterState, factors: Mapping[str, Factors], scale: float = 1) -> AdapterState:
    """The adapter with other factors, its scaling times `scale`."""
    return AdapterState(factors, state.scaling * scale, state.kind, state.base, state.extra)


def poisoned(state: AdapterState, value: float = float("nan")) -> AdapterState:
    """The adapter with one number of its last B replaced."""
    name = list(state.factors)[-1]
    a, b = state.factors[name]
    b = b.clone()
    b[1, 0] = value
    return changed(state, {**state.factors, name: Factors(a, b)})


class ServingContract:
    """Override `subject` and the flags."""

    loads_adapters: ClassVar[bool] = True
    gives_tokens: ClassVar[bool] = True
    """Whether completions hold the generated ids."""
    seeded: ClassVar[bool] = True
    """Whether the same request gives the same text whatever shares its batch."""
    chats: ClassVar[bool] = True
    """Whether messages can be given."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls) -> Subject:
        raise NotImplementedError

    def test_completions_come_in_the_order_of_the_requests(self, subject: Subject) -> None:
        requests = subject.requests()
        plain = subject.texts(requests)
        assert len(set(plain)) > len(plain) * 0.7, "members and prompts must tell themselves apart"
        assert subject.texts(requests[::-1]) == plain[::-1]
        assert subject.texts(requests[3:4]) == plain[3:4]
        assert subject.texts([requests[2], *requests[:3]]) == [plain[2], *plain[:3]]
        assert subject.generate([]) == []

    def test_text_is_that_of_the_reference(self, subject: Subject) -> None:
        if subject.reference is None:
            pytest.skip("this subject has none")
        requests = subject.requests()
        subject.reference.load(subject.adapters)
        expected = subject.reference.generate(requests)
        found = subject.generate(requests)
        assert texts(found) == texts(expected)
        assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
        if self.gives_tokens:
            assert [c.tokens for c in found] == [c.tokens for c in expected]

    def test_the_base_beside_members_is_the_base_alone(self, subject: Subject) -> None:
        requests = subject.requests()
        plain = subject.texts(requests)
        base = [i for i, request in enumerate(requests) if request.adapter is None]
        subject.engine.load({})
        alone = texts(subject.engine.generate([requests[i] for i in base]))
        assert alone == [plain[i] for i in base]

    def test_loading_replaces_also_under_the_same_names(self, subject: Subject) -> None:
        self._needs_adapters()
        first, second, *_ = subject.adapters
        asked = [Request(p, name, Sampling(TOKENS)) for name in (first, second)
                 for p in subject.prompts]  # fmt: skip
        plain, count = subject.texts(asked), len(subject.prompts)
        assert plain[:count] != plain[count:]
        states = subject.adapters
        subject.engine.load({first: states[second], second: states[first]})
        # A cache of prompts that outlives the adapter would give the old texts.
        assert texts(subject.engine.generate(asked)) == plain[count:] + plain[:count]
        subject.engine.load({second: states[second]})
        with pytest.raises(UserError, match=f"'{first}' is not loaded"):
            subject.engine.generate(asked)
        assert texts(subject.engine.generate(asked[count:])) == plain[count:]

    def test_names_are_free(self, subject: Subject) -> None:
        self._needs_adapters()
        states = list(subject.adapters.values())
        plain = subject.texts([Request(subject.prompts[1], name) for name in subject.adapters])
        names = ["../up", "g0/m 1", "Grüße", "x" * 200]
        subject.engine.load(dict(zip(names, states, strict=False)))
        asked = [Request(subject.prompts[1], name) for name in names]
        assert texts(subject.engine.generate(asked)) == plain[: len(names)]

    def test_ranks_and_scalings_may_differ(self, subject: Subject) -> None:
        self._needs_adapters()
        plain = subject.texts(subject.requests())
        other: dict[str, AdapterState] = {}
        for index, (name, state) in enumerate(subject.adapters.items()):
            # The same adapter in other words: zeros more in its rank, powers of two to and fro.
            factors = {
                module: Factors(
                    torch.cat([a, torch.ones(index, a.shape[1], dtype=a.dtype)]),
                    torch.cat([b / 2**index, torch.zeros(b.shape[0], index, dtype=b.dtype)], 1),
                )
                for module, (a, b) in state.factors.items()
            }
            other[name] = changed(state, factors, 2**index)
        subject.engine.load(other)
        assert texts(subject.engine.generate(subject.requests())) == plain

    def test_modules_may_be_left_alone(self, subject: Subject) -> None:
        self._needs_adapters()
        name, state = next(iter(subject.adapters.items()))
        part = {m: f for i, (m, f) in enumerate(state.factors.items()) if i % 3}
        full = {m: part.get(m, Factors(f.A, f.B * 0)) for m, f in state.factors.items()}
        asked = [Request(prompt, name, Sampling(TOKENS)) for prompt in subject.prompts]
        plain = subject.texts(asked)
        subject.engine.load({name: changed(state, full)})
        expected = texts(subject.engine.generate(asked))
        assert expected != plain
        subject.engine.load({name: changed(state, part)})
        assert texts(subject.engine.generate(asked)) == expected

    def test_a_seed_belongs_to_its_request(self, subject: Subject) -> None:
        if not self.seeded:
            pytest.skip("this engine keeps to no seeds")
        drawn = subject.requests(temperature=1.2, seed=3)
        plain = subject.texts(drawn)
        assert subject.texts(drawn) == plain
        assert subject.texts([*subject.requests(), *drawn[::2]])[len(plain) :] == plain[::2]
        assert subject.texts(drawn[:1]) == plain[:1]
        other = subject.texts(subject.requests(temperature=1.2, seed=2**63 - 4))
        assert sum(a != b for a, b in zip(plain, other, strict=True)) > len(plain) * 0.7

    def test_filters_narrow_the_choice_to_the_greedy_one(self, subject: Subject) -> None:
        greedy = subject.texts(subject.requests())
        assert subject.texts(subject.requests(temperature=1.2, top_k=1)) == greedy
        assert subject.texts(subject.requests(temperature=1.2, top_p=1e-6)) == greedy

    def test_stop_strings_end_the_text_before_them(self, subject: Subject) -> None:
        plain = subject.texts(subject.requests())
        asked, expected = list[Request](), list[str]()
        for request, text in zip(subject.requests(), plain, strict=True):
            if len(text) < 8:
                continue
            stop = (text[5:8], text[3:6], "never \N{SNOWMAN}")
            asked.append(Request(request.prompt, request.adapter, Sampling(TOKENS, stop=stop)))
            expected.append(text[: min(text.index(s) for s in stop[:2])])
        assert len(asked) > 3, "the subject must answer at length"
        done = subject.generate(asked)
        assert texts(done) == expected
        assert {c.finish_reason for c in done} == {"stop"}

    def test_limits_are_each_requests_own(self, subject: Subject) -> None:
        long = dict(zip(subject.requests(), subject.texts(subject.requests()), strict=True))
        limits = [1 + index % TOKENS for index in range(len(long))]
        asked = [
            Request(request.prompt, request.adapter, Sampling(limit))
            for request, limit in zip(long, limits, strict=True)
        ]
        for request, limit, done in zip(long, limits, subject.generate(asked), strict=True):
            assert long[request].startswith(done.text.rstrip("\N{REPLACEMENT CHARACTER}"))
            if done.finish_reason == "length":
                assert not self.gives_tokens or len(done.tokens) == limit
            else:
                assert done.finish_reason == "stop"
                assert done.text == long[request]

    def test_an_end_token_ends_and_is_not_in_the_text(self, subject: Subject) -> None:
        done = subject.generate([subject.ending])[0]
        assert (done.finish_reason, done.error) == ("stop", None)
        if self.gives_tokens:
            assert done.tokens[-1] in subject.ends
            assert not subject.ends & set(done.tokens[:-1])
        assert not any(mark in done.text for mark in ("<|im_end|>", "<eos>", "</s>"))

    def test_an_empty_prompt_is_its_own_affair(self, subject: Subject) -> None:
        plain = subject.texts(subject.requests()[:2])
        first, empty, last = subject.generate(
            [subject.requests()[0], Request("", None, Sampling(4)), subject.requests()[1]]
        )
        assert [first.text, last.text] == plain
        if subject.begins is None:
            assert (empty.finish_reason, empty.text) == ("error", "")
            assert "empty" in str(empty.error)
        else:
            assert [empty.text] == subject.texts([Request(subject.begins, None, Sampling(4))])

    def test_a_prompt_over_the_context_fails_alone(self, subject: Subject) -> None:
        plain = subject.texts(subject.requests()[:2])
        name = next(iter(subject.adapters), None)
        long = Request(subject.word * (subject.context + 3), name, Sampling(4))
        first, failed, last = subject.generate([subject.requests()[0], long, subject.requests()[1]])
        assert [first.text, last.text] == plain
        assert (failed.finish_reason, failed.text, failed.tokens) == ("error", "", ())
        assert str(subject.context) in str(failed.error)
        if name is not None:
            assert repr(name) in str(failed.error)

    def test_unicode_goes_through_whole(self, subject: Subject) -> None:
        plain = subject.texts(subject.requests()[:1])
        said = [
            "naïve Grüße",
            "日本語の文",
            "👩‍👩‍👧 🇨🇭",
            "é e\u0301 \u200b‮abc",
            'quote " \\ \n\t{}',
        ]
        asked = [Request(f"{subject.word}{text}", None, Sampling(4)) for text in said]
        *found, neighbour = subject.texts([*asked, subject.requests()[0]])
        assert [neighbour] == plain
        assert found == [subject.texts([request])[0] for request in asked]

    def test_messages_are_answered(self, subject: Subject) -> None:
        if not self.chats:
            pytest.skip("this engine takes text alone")
        messages = [{"role": "user", "content": subject.prompts[0]}]
        name = next(iter(subject.adapters), None)
        asked = Request(messages, name, Sampling(TOKENS))
        text = subject.texts([asked])
        assert subject.texts([*subject.requests(), asked])[-1:] == text
        if subject.reference is not None:
            subject.reference.load(subject.adapters)
            assert texts(subject.reference.generate([asked])) == text

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_member_with_nan_fails_alone(self, subject: Subject, value: float) -> None:
        self._needs_adapters()
        requests = subject.requests()
        plain = subject.generate(requests)
        sick = list(subject.adapters)[2]
        subject.engine.load({**subject.adapters, sick: poisoned(subject.adapters[sick], value)})
        for request, before, after in zip(
            requests, plain, subject.engine.generate(requests), strict=True
        ):
            if request.adapter == sick:
                assert after.finish_reason == "error"
                assert repr(sick) in str(after.error)
                assert "NaN" in str(after.error) or "not finite" in str(after.error)
            else:
                assert (after.text, after.error) == (before.text, None)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
    def test_cancelling_leaves_the_engine_usable(
        self, subject: Subject, error: type[BaseException]
    ) -> None:
        plain = subject.texts(subject.requests())

        def stop(done: int, total: int) -> None:
            if done:
                raise error

        for _ in range(2):
            with pytest.raises(error):
                subject.engine.generate(subject.requests(), stop)
        assert texts(subject.engine.generate(subject.requests())) == plain
        assert subject.texts(subject.requests()) == plain

    def test_progress_counts_up_to_all(self, subject: Subject) -> None:
        calls: list[tuple[int, int]] = []
        asked = [*subject.requests(), Request(subject.word * (subject.context + 3))]
        subject.engine.load(subject.adapters)
        subject.engine.generate(asked, lambda done, total: calls.append((done, total)))
        assert calls == sorted(calls)
        assert calls[-1] == (len(asked), len(asked))
        assert {total for _, total in calls} == {len(asked)}

    def test_an_unknown_adapter_is_refused_before_anything_runs(self, subject: Subject) -> None:
        plain = subject.texts(subject.requests()[:2])
        with pytest.raises(UserError, match="nobody"):
            subject.engine.generate([*subject.requests()[:2], Request("ab", "nobody")])
        assert texts(subject.engine.generate(subject.requests()[:2])) == plain

    def test_an_adapter_it_cannot_run_is_refused_and_the_others_stay(
        self, subject: Subject
    ) -> None:
        model = tiny.model("llama")
        odd = next(iter(subject.adapters.values()), tiny.adapter(model, seed=1))
        odd = AdapterState(odd.factors, odd.scaling, kind="sinelora")
        plain = subject.texts(subject.requests()[:4])
        with pytest.raises(UserError, match="adapter"):
            subject.engine.load({"odd": odd})
        assert texts(subject.engine.generate(subject.requests()[:4])) == plain

    def _needs_adapters(self) -> None:
        if not self.loads_adapters:
            pytest.skip("this engine loads no adapters")
