"""What a look sees, against PEFT and plain arithmetic; and that nothing is left changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.functional import cross_entropy

import loralab.adapters as adapters
import tiny
from loralab.errors import UserError
from loralab.health import forced, runners
from loralab.health.divergence import DivergenceProbe, OwnDivergenceProbe
from loralab.health.look import OWN_TOKENS, Subject, measure
from loralab.health.prompts import Prompt, shipped_prompts, task_prompts
from loralab.health.text import TextProbe

PROBES = (DivergenceProbe(), OwnDivergenceProbe(), TextProbe())


def prompts(count: int = 5) -> list[Prompt]:
    made = [
        Prompt(text=tiny.words(3 + n, n), good=tiny.words(4 + n % 3, 50 + n)) for n in range(count)
    ]
    chat = ({"role": "user", "content": tiny.words(4, 90)},)
    return [*made, Prompt(messages=chat, good=tiny.words(5, 91))]


def lora(kind: str = "llama", seed: int = 3, size: float = 0.15, **more: Any) -> Any:
    """A PeftModel with A and B random."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny.model(kind), LoraConfig(**(options | more)))
    fill(model, seed, size)
    return model


def fill(model: nn.Module, seed: int = 3, size: float = 0.15) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * size


def zero(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()


def subject(model: Any, **more: Any) -> Subject:
    options: dict[str, Any] = {"prompts": prompts(), "max_new_tokens": 12}
    return Subject(model, tiny.tokenizer(), **(options | more))


def values(model: Any, **more: Any) -> dict[str, float]:
    return dict(measure(subject(model, **more).look(), PROBES, 0).values)


@torch.no_grad()
def reference(model: Any, base: Any, rows: Any) -> dict[str, float]:
    """Sequence by sequence, whole logits, float64."""
    kl, agree, nll, entropy, base_nll = [], [], [], [], []
    for row in rows:
        ids = torch.tensor([row.ids])
        at = slice(row.start - 1, len(row.ids) - 1)
        p, q = (one(input_ids=ids).logits[0, at].double().log_softmax(-1) for one in (model, base))
        targets = ids[0, row.start :]
        inside = len(targets) - row.ends
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        entropy += (-p.exp() * p).sum(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
        nll += cross_entropy(p[:inside], targets[:inside], reduction="none").tolist()
        base_nll += cross_entropy(q[:inside], targets[:inside], reduction="none").tolist()

    def mean(numbers: list[float]) -> float:
        return sum(numbers) / len(numbers)

    return {
        "kl": mean(kl),
        "agreement": mean(agree),
        "entropy": mean(entropy),
        "perplexity": torch.tensor(mean(nll)).exp().item(),
        "base.perplexity": torch.tensor(mean(base_nll)).exp().item(),
    }


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_divergence_is_that_of_the_whole_logits(kind: str) -> None:
    model = lora(kind)
    seen = subject(model)
    got = DivergenceProbe().measure(seen.look())
    expected = reference(model.get_base_model(), tiny.model(kind), seen.good_rows)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=2e-4), name
    assert got["kl"] > 0.01
    assert got["agreement"] < 1


def test_a_soft_capped_head_is_compared_after_its_cap() -> None:
    import transformers as tf

    def made() -> Any:
        config = tiny.CONFIGS["gemma3"]()
        config.final_logit_softcapping = 2.0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = tf.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                parameter.data += 0.25 * torch.randn_like(parameter)
        return model.eval()

    model = get_peft_model(made(), LoraConfig(r=4, target_modules="all-linear"))
    fill(model)
    seen = subject(model)
    expected = reference(model.get_base_model(), made(), seen.good_rows)
    for _ in range(2):
        got = DivergenceProbe().measure(seen.look())
        assert got["kl"] == pytest.approx(expected["kl"], rel=2e-4)


def test_zero_b_is_the_base_and_random_b_is_not() -> None:
    model = lora()
    zero(model)
    still = values(model)
    assert still["kl"] == 0
    assert still["kl.first32"] == 0
    assert still["agreement"] == 1
    for name, value in still.items():
        if f"base.{name}" in still:
            assert still[f"base.{name}"] == value or value != value, name
    fill(model)
    moved = values(model)
    assert moved["kl"] > 0.01
    assert moved["kl.first32"] > 0.01
    assert moved["perplexity"] != moved["base.perplexity"]


def test_completions_are_those_of_generate() -> None:
    model = lora()
    seen = subject(model)
    look = seen.look()
    for made, request in zip(look.completions, seen.requests, strict=True):
        ids = torch.tensor([seen.encoder.encode(request)])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
        assert made.token_ids == tuple(out[0, ids.shape[1] :].tolist())
        assert made.ended == (made.token_ids[-1] == tiny.EOS)
    assert look.base_completions != look.completions


def test_own_samples_are_read_to_their_thirty_second_token() -> None:
    model = lora()
    seen = subject(model, max_new_tokens=40)
    look = seen.look()
    lengths = [min(OWN_TOKENS, len(made.token_ids)) for made in look.completions]
    assert torch.bincount(look.own.rows).tolist() == lengths
    assert look.own.tokens.tolist() == [
        token for made in look.completions for token in made.token_ids[:OWN_TOKENS]
    ]
    rows = [
        forced.Row(
            n,
            (*seen.encoder.encode(request), *made.token_ids[:OWN_TOKENS]),
            len(seen.encoder.encode(request)),
        )
        for n, (request, made) in enumerate(zip(seen.requests, look.completions, strict=True))
    ]
    expected = reference(model.get_base_model(), tiny.model("llama"), rows)
    assert OwnDivergenceProbe().measure(look)["kl.first32"] == pytest.approx(
        expected["kl"], rel=2e-4
    )


def test_batches_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora()
    whole = subject(model).look().good
    monkeypatch.setattr(runners, "BATCH_TOKENS", 30)
    monkeypatch.setattr(runners, "BATCH_LOGITS", 67 * 7)
    monkeypatch.setattr(forced, "PIECE", 67 * 3)
    parts = subject(model).look().good
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.ends, parts.ends)
    for name in ("nll", "entropy", "kl", "base_nll", "base_entropy"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-4, atol=1e-5)


def test_the_base_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora()
    seen = subject(model)
    first = seen.look()
    _ = first.good, first.base_completions
    ran: list[Any] = []
    monkeypatch.setattr(seen._known._runner, "run", ran.append)
    fill(model, seed=4)
    second = seen.look()
    assert second.base_completions is first.base_completions
    assert torch.equal(second.good.base_nll, first.good.base_nll)
    assert not torch.equal(second.good.nll, first.good.nll)
    assert not ran


def state(model: nn.Module) -> dict[str, Any]:
    """All that a look could leave changed."""
    return {
        "weights": {n: p.detach().clone() for n, p in model.state_dict().items()},
        "trainable": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "forwards": [m.__dict__.get("forward") for m in model.modules()],
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ],
        "attention": [
            getattr(getattr(m, "config", None), "_attn_implementation_internal", None)
            for m in model.modules()
        ],
        "random": (torch.get_rng_state(), random.getstate()),
        "active": getattr(model, "active_adapters", None),
        "cache": model.config.use_cache,
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def kinds() -> Iterator[tuple[str, Any]]:
    target = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    yield "lora", lambda: lora(lora_dropout=0.5)
    yield "frozen A", lambda: _frozen(lora())
    yield "pissa", lambda: _pissa()
    yield "lslora", lambda: get_peft_model(tiny.model("llama"), adapters.LSLoraConfig(**target))
    yield "sinelora", lambda: get_peft_model(tiny.model("llama"), adapters.SineLoraConfig(**target))
    yield "saved head", lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    yield "injected", lambda: inject_adapter_in_model(LoraConfig(**target), tiny.model("llama"))


def _frozen(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def _pissa() -> Any:
    model = lora()
    adapters.initialize(model, "pissa")
    return model


@pytest.mark.parametrize(("name", "make"), list(kinds()), ids=lambda x: x if type(x) is str else "")
def test_a_model_is_left_as_it_was(name: str, make: Any) -> None:
    model = make()
    fill(model)
    model.train()
    model.get_base_model().model.layers[0].eval() if hasattr(model, "get_base_model") else None
    before = state(model)
    first = values(model)
    after = state(model)
    for what in before:
        assert same(before[what], after[what]), what
    again = values(model)
    assert first.keys() == again.keys()
    assert all(again[k] == v or v != v for k, v in first.items())
    base = values(tiny.model("llama"))
    assert first["base.perplexity"] == pytest.approx(base["perplexity"], rel=1e-5)
    assert first["kl"] > 0


def test_pissa_starts_at_its_true_base() -> None:
    model = get_peft_model(
        tiny.model("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapters.initialize(model, "pissa")
    got = values(model)
    assert got["kl"] < 1e-6
    assert got["base.perplexity"] == pytest.approx(values(tiny.model("llama"))["perplexity"], 1e-5)


def test_a_second_model_is_the_base() -> None:
    model, other = tiny.model("llama"), tiny.model("llama", seed=1)
    seen = subject(model, base=other)
    got = DivergenceProbe().measure(seen.look())
    expected = reference(model, other, seen.good_rows)
    assert got["kl"] == pytest.approx(expected["kl"], rel=2e-4)
    assert got["base.perplexity"] == pytest.approx(expected["base.perplexity"], rel=2e-4)
    assert not any(map(seen.look().base_completions.__contains__, seen.look().completions))


def test_without_a_base_nothing_is_compared() -> None:
    got = values(tiny.model("llama"))
    assert not [name for name in got if name.startswith("base.")]
    assert got["kl"] != got["kl"]
    assert got["perplexity"] > 1
    assert got["text.charset_drift"] != got["text.charset_drift"]


def test_now_compares_with_the_model_as_it_was() -> None:
    model = tiny.model("llama")
    start = copy.deepcopy(model)
    seen = subject(model, base="now")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    got = dict(measure(seen.look(), PROBES, 3).values)
    expected = reference(model, start, seen.good_rows)
    assert got["kl"] == pytest.approx(expected["kl"], rel=2e-4)
    assert got["base.perplexity"] == pytest.approx(expected["base.perplexity"], rel=2e-4)
    assert got["kl.first32"] != got["kl.first32"]
    assert got["base.text.length"] == values(start)["text.length"]


def test_prompts_without_a_good_text_take_the_bases_answer() -> None:
    model = lora()
    seen = subject(model, prompts=[tiny.words(4, 1), [{"role": "user", "content": "ab cd"}]])
    rows = seen.good_rows
    for row, made in zip(rows, seen.base_completions, strict=True):
        assert row.ids[row.start :] == made.token_ids
    assert DivergenceProbe().measure(seen.look())["kl"] > 0


def test_nan_weights_show_and_do_not_raise() -> None:
    model = lora()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(torch.nan)
    got = values(model)
    assert got["text.failed"] == 1
    assert got["text.empty"] == 1
    for name in ("kl", "agreement", "perplexity", "entropy", "kl.first32"):
        assert got[name] != got[name], name
    assert got["base.perplexity"] > 1


def test_gradients_flow_as_before_a_look() -> None:
    """Inference tensors left in a cache would break the next backward pass."""
    ids = torch.randint(3, 60, (2, 9))

    def gradients(looked: bool) -> list[torch.Tensor]:
        model = lora()
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable()
        model.train()
        if looked:
            values(model)
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_what_cannot_be_looked_at_is_refused() -> None:
    with pytest.raises(UserError, match="virtual tokens"):
        subject(
            get_peft_model(
                tiny.model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
            )
        )
    with pytest.raises(UserError, match="with one prompt or more"):
        subject(tiny.model("llama"), prompts=[])
    with pytest.raises(UserError, match="'nwo'"):
        subject(tiny.model("llama"), base="nwo")
    merged = lora()
    merged.merge_adapter()
    with pytest.raises(UserError, match="merged"):
        _ = subject(merged).base_completions


def test_readings_show_the_worst_text_first() -> None:
    model = lora()
    seen = subject(model)
    look = seen.look()
    made = list(look.completions)
    worst = 3
    made[worst] = type(made[0])("\n" * 12, (5,) * 12, False)
    look.__dict__["completions"] = tuple(made)
    reading = measure(look, [TextProbe()], 7)
    assert reading.step == 7
    assert reading.examples[0].completion == "\n" * 12
    assert reading.examples[0].base == seen.base_completions[worst].text
    assert {e.prompt for e in reading.examples} >= {p.shown for p in seen.prompts[:2]}


def test_shipped_prompts_are_balanced_and_ours() -> None:
    made = shipped_prompts()
    assert len(made) == 32
    assert len({p.shown for p in made}) == 32
    counts = [[p.kind for p in made[:12]].count(kind) for kind in {p.kind for p in made}]
    assert counts == [2] * 6
    assert all(p.good and p.good.strip() for p in made)


def test_a_task_lends_its_prompts_and_gold() -> None:
    from loralab import tasks

    task = tasks.get("countdown")
    made = task_prompts(task, "test", 3)
    assert len(made) == 3
    for prompt, example in zip(made, task.examples("test"), strict=False):
        assert prompt.good == task.gold(example)
        assert prompt.kind == "task"
