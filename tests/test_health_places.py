"""Looks where models really are: in training, quantised, copied into the native engine."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

import loralab.adapters as adapters
import tiny
from loralab import cli
from loralab.config import TrainingConfig
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.gradient.rows import Row
from loralab.gradient.sft import train
from loralab.health.divergence import DivergenceProbe, OwnDivergenceProbe
from loralab.health.look import Subject, measure
from loralab.health.native_copy import plain_adapter
from loralab.health.prompts import Prompt
from loralab.health.text import TextProbe
from loralab.health.token_classes import TokenClassProbe
from loralab.models.load import load
from loralab.registry import PROBES

ALL = (TextProbe(), DivergenceProbe(), OwnDivergenceProbe(), TokenClassProbe())
PROMPTS = [Prompt(text=tiny.words(3 + n, n), good=tiny.words(5, 50 + n)) for n in range(5)]
BF16 = torch.bfloat16


def lora(dtype: torch.dtype = torch.float32, size: float = 0.1, **more: Any) -> Any:
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny.model("llama", dtype), LoraConfig(**(options | more)))
    fill(model, size)
    return model


def fill(model: nn.Module, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = (drawn * (size if "lora_B" in name else 0.1)).to(parameter.dtype)


def subject(model: Any, **more: Any) -> Subject:
    return Subject(model, tiny.tokenizer(), prompts=PROMPTS, max_new_tokens=10, **more)


def numbers(model: Any) -> dict[str, float]:
    return dict(measure(subject(model).look(), ALL, 0).values)


def alike(a: dict[str, float], b: dict[str, float], rel: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(
        a[k] == b[k] or (a[k] != a[k] and b[k] != b[k]) or a[k] == pytest.approx(b[k], rel=rel)
        for k in a
    )


class Looking(TrainerCallback):  # type: ignore[misc]
    """Looks after each step, and keeps a copy of the model as it then was."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.models: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.subject = subject(more["model"])
        self.look(more["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.look(more["model"], state.global_step)

    def look(self, model: Any, step: int) -> None:
        self.seen.append(dict(measure(self.subject.look(), ALL, step).values))
        self.models.append({n: p.detach().clone() for n, p in model.named_parameters()})


def training_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (7, 9, 12, 8, 11, 10):
        ids = (tiny.BOS, *torch.randint(4, 60, (length,), generator=generator).tolist(), 1)
        made.append(Row(ids, (-100,) * 3 + ids[3:]))
    return made


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["lora", "lslora", "checkpointed"])
def test_a_model_in_training_is_seen_as_it_is_and_trains_on_the_same(kind: str, fast: bool) -> None:
    """Fused forwards, sequences laid end to end and a labelled head are all in place."""

    def made() -> Any:
        torch.manual_seed(0)
        if kind != "lslora":
            return lora(lora_dropout=0.1)
        config = adapters.LSLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(tiny.model("llama"), config)
        fill(model)
        return model

    settings = TrainingConfig(
        steps=3, batch_size=3, lr=2e-2, fast=fast, gradient_checkpointing=kind == "checkpointed"
    )
    looking = Looking()
    watched, alone = made(), made()
    told = train(watched, tiny.tokenizer(), training_rows(), settings, 4, [looking])
    plain = train(alone, tiny.tokenizer(), training_rows(), settings, 4)
    assert told.losses == plain.losses
    for (name, a), (_, b) in zip(watched.named_parameters(), alone.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len(looking.seen) == 4
    fresh = made()
    for seen, weights in zip(looking.seen, looking.models, strict=True):
        for name, parameter in fresh.named_parameters():
            parameter.data = weights[name]
        assert alike(seen, numbers(fresh), rel=2e-3)
    assert looking.seen[0]["kl"] != looking.seen[-1]["kl"]


def test_a_whole_model_in_training_is_compared_with_its_start() -> None:
    model = tiny.model("llama")
    start = copy.deepcopy(model)
    seen = subject(model, base="now")
    settings = TrainingConfig(steps=3, batch_size=3, lr=1e-2)
    assert DivergenceProbe().measure(seen.look())["kl"] == 0
    train(model, tiny.tokenizer(), training_rows(), settings, 4)
    got = DivergenceProbe().measure(seen.look())
    expected = DivergenceProbe().measure(subject(model, base=start).look())
    assert got["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert got["kl"] > 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, of widths that bitsandbytes' CPU kernels take."""
    path = tmp_path_factory.mktemp("model")
    tiny.save_quantisable(path)
    return path


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_quantised_base_is_its_own_base(bits: Any, folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base, _ = load(str(folder), "float32", quantization=bits)
    plain = numbers(base)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    fill(model, 0.3)
    got = numbers(model)
    assert got["kl"] > 1e-3
    assert got["base.perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)
    fill(model, 0.0)
    assert numbers(model)["kl"] == 0


def texts(engine: BatchedEngine, seen: Subject, adapter: str | None) -> list[tuple[int, ...]]:
    asked = [Request(request, adapter, Sampling(10)) for request in seen.requests]
    return [made.tokens for made in engine.generate(asked)]


@pytest.fixture
def native() -> BatchedEngine:
    """The native engine over the plain model."""
    model = tiny.model("llama", BF16)
    engine = BatchedEngine(model, tiny.tokenizer())
    if not engine.kernel.startswith("native"):
        pytest.skip("no native engine here")
    return engine


@pytest.mark.parametrize("start", ["zero_b", "pissa"])
def test_the_native_copy_answers_as_base_and_as_adapter(native: Any, start: str) -> None:
    model = lora(BF16)
    if start == "pissa":
        adapters.initialize(model, "pissa")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    seen = subject(model)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    layers = list(map(type, model.modules()))
    look = seen.look()
    assert seen._native is not None
    assert [made.token_ids for made in look.base_completions] == texts(native, seen, None)
    state = plain_adapter(model, seen.causal)
    assert state is not None
    native.load({"a": state})
    assert [made.token_ids for made in look.completions] == texts(native, seen, "a")
    assert look.completions != look.base_completions
    assert list(map(type, model.modules())) == layers
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_zero_b_writes_what_its_base_writes_in_bf16() -> None:
    look = subject(lora(BF16, size=0.0)).look()
    assert look.completions == look.base_completions
    assert DivergenceProbe().measure(look)["kl"] == 0


def test_the_native_copy_follows_the_adapter_as_it_moves(native: Any) -> None:
    model = lora(BF16, size=0.0)
    seen = subject(model)
    first = seen.look().completions
    fill(model, 0.3)
    assert seen.look().completions != first


def test_only_plain_lora_in_bf16_runs_as_a_copy() -> None:
    def copied(model: Any, **more: Any) -> bool:
        return subject(model, **more)._native is not None

    target = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    assert not copied(lora())
    assert not copied(tiny.model("llama", BF16))
    assert not copied(lora(BF16), base=tiny.model("llama", BF16))
    assert not copied(get_peft_model(tiny.model("llama", BF16), adapters.LSLoraConfig(**target)))
    assert not copied(lora(BF16, use_dora=True))
    assert not copied(lora(BF16, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    two = lora(BF16)
    two.add_adapter("more", LoraConfig(**target))
    two.base_model.set_adapter(["default", "more"])
    assert not copied(two)
    trained = lora(BF16)
    trained.get_base_model().model.norm.weight.requires_grad_(True)
    assert not copied(trained)
    off = lora(BF16)
    off.base_model.disable_adapter_layers()
    assert not copied(off)


def test_an_adapter_read_back_from_disk_is_seen_as_it_was(tmp_path: Path) -> None:
    model = lora()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert alike(numbers(model), numbers(again))
    assert not any(p.requires_grad for p in again.parameters())


def test_probes_are_listed_with_what_they_cost(capsys: Any) -> None:
    assert cli.main(["probes"]) == 0
    text = capsys.readouterr().out
    for name in PROBES.names():
        probe = PROBES.load(name)
        assert probe.name == name
        assert f"{name}\n    {probe.measures}\n    cost: {probe.cost}\n" in text
