"""Rows run together are the rows run alone: end to end, padded, and by the native engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from loralab.engines.attention import attention_configs
from loralab.engines.native.build import NativeUnavailableError, library
from loralab.health import forced, runners
from loralab.health.divergence import DivergenceProbe, OwnDivergenceProbe
from loralab.health.forced import Row
from loralab.health.look import Subject, measure
from loralab.health.packed import Branches, packs
from loralab.health.prompts import Prompt
from loralab.health.runners import BATCH_TOKENS, by_length, by_prompt, run
from loralab.health.still import held_still
from loralab.health.text import TextProbe
from loralab.health.token_classes import TokenClassProbe


def draw(size: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, tiny.VOCABULARY, (size,), generator=generator).tolist())


def rows(prompt: int = 9, longest: int = 12) -> list[Row]:
    """Two prompts with three answers each, their rows mixed, one answer of one token."""
    fronts = [draw(prompt, 1), draw(prompt - 4, 2)]
    sizes = [(0, 5), (1, longest), (0, longest), (1, 1), (1, 7), (0, 2)]
    return [
        Row(at, fronts[which] + draw(size, 10 + at), len(fronts[which]))
        for at, (which, size) in enumerate(sizes)
    ]


@torch.no_grad()
def alone(causal: Any, given: Sequence[Row]) -> torch.Tensor:
    parts = [
        causal(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : len(row.ids) - 1]
        for row in given
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_rows_end_to_end_are_rows_alone(kind: str) -> None:
    model = tiny.model(kind)
    given = rows()
    with held_still(model):
        assert packs(model, attention_configs(model))
        seen = run(model, given)
    torch.testing.assert_close(seen.logits, alone(model, given), rtol=1e-5, atol=2e-5)
    assert seen.hidden is not None
    assert len(seen.hidden) == sum(len(row.answer) for row in given)


def test_a_model_that_is_not_known_gets_padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    given = rows()
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "eager")
    with held_still(model):
        assert not packs(model, attention_configs(model))
        seen = run(model, given)
    torch.testing.assert_close(seen.logits, alone(model, given), rtol=1e-5, atol=2e-5)


def test_a_shared_prompt_runs_once() -> None:
    given = rows()
    branches = Branches([(row.ids, row.start) for row in given])
    assert len(branches.ids) == 9 + 5 + sum(len(row.answer) - 1 for row in given)
    for row, ends in zip(given, branches.ends, strict=True):
        assert branches.positions[ends].tolist() == list(range(row.start - 1, len(row.ids) - 1))
        assert branches.ids[ends].tolist() == list(row.ids[row.start - 1 : -1])


def test_batches_hold_every_row_once_and_no_more_than_they_may() -> None:
    given = [
        Row(at, draw(30 + at % 7, at % 5) + draw(20 + 3 * (at % 11), 100 + at), 30 + at % 7)
        for at in range(40)
    ]
    silent = Row(99, draw(8, 3), 8)
    for arrange in (by_prompt, by_length):
        made = arrange([*given, silent], tiny.VOCABULARY)
        assert sorted(at for batch in made for at in batch) == list(range(40))
        assert made == arrange([*given, silent], tiny.VOCABULARY)
        for batch in made:
            chosen = [given[at] for at in batch]
            flat = len(Branches([(row.ids, row.start) for row in chosen]).ids)
            padded = len(chosen) * max(len(row.ids) for row in chosen)
            assert (flat if arrange is by_prompt else padded) <= BATCH_TOKENS
    few = by_prompt(given, runners.BATCH_LOGITS // 60)
    assert all(sum(len(given[at].answer) for at in batch) <= 60 for batch in few if len(batch) > 1)
    together = [{given[at].prompt_ids for at in batch} for batch in by_prompt(given, 67)]
    assert sum(map(len, together)) < len({row.prompt_ids for row in given}) + len(together)


def lora(dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    model = get_peft_model(
        tiny.model("llama", dtype),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **more),
    )
    fill(model, 3)
    return model


def fill(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            size = 0.1 if "lora_B" in name else 0.125
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


def subject(model: Any) -> Subject:
    prompts = [
        Prompt(text=tiny.words(3 + 5 * n, n), good=tiny.words(4 + n % 3, 50 + n)) for n in range(6)
    ]
    return Subject(model, tiny.tokenizer(), prompts=prompts, max_new_tokens=12)


def probes() -> list[Any]:
    return [TextProbe(), DivergenceProbe(), OwnDivergenceProbe(), TokenClassProbe()]


def test_looks_that_read_all_in_one_pass_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora()
    seen, asked = subject(model), probes()
    measure(seen.look(), asked, 0)
    fill(model, 4)
    runs: list[int] = []
    inner = runners.run
    monkeypatch.setattr(
        runners, "run", lambda causal, batch: (runs.append(len(batch)), inner(causal, batch))[1]
    )
    later = measure(seen.look(), asked, 1).values
    # The model reads the good, own and exchanged rows at once, its base only the own ones.
    assert runs == [18, 6]
    fresh = dict(measure(subject(model).look(), probes(), 1).values)
    for name in ("kl", "loss.all", "entropy", "kl.first32", "text.base_nll", "loss.prompt_gain"):
        assert later[name] == pytest.approx(fresh[name], rel=1e-5), name
    assert later["agreement"] == fresh["agreement"]
    assert later["kl"] > 1e-3


def test_a_set_that_cannot_be_read_is_not_asked_for_again() -> None:
    seen = subject(lora())
    look = seen.look()

    def broken(_: Any) -> Any:
        raise ValueError("no rows")

    with pytest.raises(ValueError, match="no rows"):
        look.expect("broken", broken)
    assert len(seen.look().good.nll) == len(look.good.nll) > 0


def test_expectations_of_what_can_not_come() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [0.5, 0.0, 1.0]])
    base = torch.tensor([[2.0, 1.0, -torch.inf], [0.5, 0.0, 1.0]])
    got = forced.compare(Row(0, (0, 1, 0), 1), logits, base)
    p = logits[0, :2].softmax(-1)
    q = base[0, :2].softmax(-1)
    assert float(got.entropy[0]) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-6)
    assert float(got.kl[1]) == 0
    # The difference of two infinities is none.
    assert float(got.kl[0]) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)


def native_library() -> bool:
    try:
        library()
    except NativeUnavailableError:
        return False
    return True


needs_native = pytest.mark.skipif(not native_library(), reason="no native kernels here")


@needs_native
def test_the_native_copy_reads_rows_as_the_model_does() -> None:
    model = lora(torch.bfloat16)
    seen = subject(model)
    native = seen._native
    assert native is not None
    assert seen._load_native()
    given = rows(prompt=36, longest=25)
    exact = tiny.model("llama")
    exact.load_state_dict(tiny.model("llama", torch.bfloat16).float().state_dict())
    wide = get_peft_model(
        exact, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    fill(wide, 3)
    with torch.no_grad(), wide.disable_adapter():
        base = alone(wide, given)
    cases = ((native.adapted, alone(wide, given)), (native.base, base))
    for runner, expected in cases:
        got = runner.run(given).logits
        apart = (got.log_softmax(-1) - expected.log_softmax(-1)).abs()
        assert float(apart.mean()) < 0.03
        # A page that rows share holds what each of them would have written.
        singly = torch.cat([runner.run([row]).logits for row in given])
        assert torch.equal(got, singly)
        # Two rows end on a page's border, and one prompt goes on where another one ends.
        border = [Row(0, draw(32, 1) + draw(9, 5), 32), Row(1, draw(32, 1) + draw(1, 6), 32)]
        border += [Row(2, draw(32, 1)[:16] + draw(20, 7), 16), Row(3, draw(32, 1)[:16] * 2, 16)]
        singly = torch.cat([runner.run([row]).logits for row in border])
        assert torch.equal(runner.run(border).logits, singly)
    assert float((cases[0][1] - base).abs().mean()) > 0.1


@needs_native
def test_a_forward_that_is_not_in_the_copy_is_noticed() -> None:
    model = lora(torch.bfloat16)
    seen = subject(model)
    assert seen.readers()[0] is seen._native.adapted  # type: ignore[union-attr]
    inner = model.get_base_model().model.layers[0].mlp
    handle = inner.register_forward_hook(lambda module, given, out: -out)
    assert seen.readers()[0] is not seen._native.adapted  # type: ignore[union-attr]
    handle.remove()
    assert seen.readers()[0] is seen._native.adapted  # type: ignore[union-attr]


@needs_native
def test_native_looks_keep_the_base() -> None:
    model = lora(torch.bfloat16)
    seen = subject(model)
    first = seen.look()
    before = first.good
    fill(model, 5)
    runs: list[Any] = []
    base = seen._native.base  # type: ignore[union-attr]
    inner = base.run
    base.run = lambda batch: (runs.append(batch), inner(batch))[1]  # type: ignore[method-assign]
    after = seen.look().good
    assert not runs
    assert torch.equal(before.base_nll, after.base_nll)
    assert not torch.equal(before.nll, after.nll)


@needs_native
def test_zero_b_is_the_base_to_the_native_engine() -> None:
    model = lora(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    values = measure(subject(model).look(), probes(), 0).values
    assert values["kl"] == values["kl.first32"] == 0
    assert values["agreement"] == 1
    assert values["loss.all"] == values["base.loss.all"]
