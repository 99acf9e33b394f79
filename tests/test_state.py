"""An adapter's own files: what PEFT makes of them, and what comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import tiny
from loralab.adapters.extract import state_of
from loralab.adapters.state import AdapterState, Factors
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.errors import UserError


def mixed(seed: int = 3) -> AdapterState:
    """Ranks 2, 4 and 7, one scaling."""
    model = tiny.model("llama")
    parts = [tiny.adapter(model, seed + rank, rank, names=None) for rank in (2, 4, 7)]
    names = tiny.linear_names(model)
    return AdapterState(
        {name: parts[min(i % 4, 2)].factors[name] for i, name in enumerate(names)}, 1.5
    )


def same(a: AdapterState, b: AdapterState) -> bool:
    return a.digest() == b.digest() and a.factors.keys() == b.factors.keys()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[4, 9, 21, 33, 50, 8]])
    return model(input_ids=ids).logits  # type: ignore[no-any-return]


def test_modules_of_different_rank_come_back_and_are_peft_s(tmp_path: Path) -> None:
    state = mixed()
    state.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], set(config["rank_pattern"].values())) == (7, {2, 4})
    assert same(AdapterState.load(tmp_path), state)
    model = PeftModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert same(state_of(model), state)
    by_hand = tiny.model("llama")
    for name, (a, b) in state.factors.items():
        by_hand.get_submodule(name).weight.data += state.scaling * b @ a
    torch.testing.assert_close(logits(model), logits(by_hand), atol=1e-4, rtol=1e-4)


def test_the_engine_runs_modules_of_different_rank(tmp_path: Path) -> None:
    state = mixed()
    merged = tiny.model("llama")
    for name, (a, b) in state.factors.items():
        merged.get_submodule(name).weight.data += state.scaling * b @ a
    engine = BatchedEngine(tiny.model("llama"), tiny.tokenizer())
    engine.load({"x": state})
    sampling = Sampling(max_new_tokens=8)
    prompt = tiny.words(5, 1)
    [ours] = engine.generate([Request(prompt, "x", sampling)])
    [theirs] = BatchedEngine(merged, tiny.tokenizer()).generate([Request(prompt, None, sampling)])
    assert ours.tokens == theirs.tokens


@pytest.mark.parametrize("rs", [False, True])
def test_peft_s_patterns_and_rank_stabilised_scaling_are_followed(tmp_path: Path, rs: bool) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
        alpha_pattern={"v_proj": 9},
        use_rslora=rs,
    )
    model = get_peft_model(tiny.model("llama"), config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    state = AdapterState.load(tmp_path)
    assert {f.A.shape[0] for f in state.factors.values()} == {2, 3, 4}
    for name, pair in state.factors.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(state.scaling * pair.B @ pair.A, expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"peft_type": "LOHA"}, "not plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model"),
        ({"init_lora_weights": "loftq"}, "replaced"),
        ({"r": 3}, "the config says rank 3, its tensors 4"),
    ],
)
def test_what_is_more_than_two_factors_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    tiny.adapter(tiny.model("llama"), seed=1).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=said):
        AdapterState.load(tmp_path)


def test_its_files_can_be_read_by_others(tmp_path: Path) -> None:
    tiny.adapter(tiny.model("llama"), seed=1).save(tmp_path / "a")
    plain = tmp_path / "plain"
    plain.write_text("x")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()}
    assert modes == {plain.stat().st_mode & 0o777}


def test_nothing_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no factors"):
        AdapterState({}, 1.0).save(tmp_path)


def test_dtypes_stay_as_they_are(tmp_path: Path) -> None:
    state = tiny.adapter(tiny.model("llama"), seed=1)
    half = {n: Factors(f.A.bfloat16(), f.B.bfloat16()) for n, f in state.factors.items()}
    AdapterState(half, 1.5).save(tmp_path)
    back = AdapterState.load(tmp_path)
    assert {t.dtype for pair in back.factors.values() for t in pair} == {torch.bfloat16}
