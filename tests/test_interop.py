"""Adapters in PEFT's and mlx-lm's formats, against those libraries' own arithmetic."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from loralab.adapters.interop import read_mlx, read_peft, write_mlx
from loralab.adapters.state import AdapterState, Factors
from loralab.errors import UserError

PROMPT = [0, 5, 17, 33, 9, 60, 21, 8]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def directory(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def saved_by_peft(model: Any, path: Path, **options: Any) -> Any:
    """A PEFT model with every adapter parameter random, saved by PEFT."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    made = get_peft_model(copy.deepcopy(model), LoraConfig(**{**settings, **options}))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    made.save_pretrained(path)
    return made.eval()


def mlx_logits(directory: Path, adapter: Path, prompt: list[int]) -> torch.Tensor:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    made, _ = load_model(directory)
    made = load_adapters(made, str(adapter))
    made.eval()
    logits = made(mx.array([prompt]))[0].astype(mx.float32)
    return torch.tensor(logits.tolist())


@torch.no_grad()
def torch_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([prompt])).logits[0].float()
    return logits


def same(one: AdapterState, other: AdapterState) -> None:
    assert one.scaling == other.scaling
    assert set(one.factors) == set(other.factors)
    for module, factors in one.factors.items():
        for given, made in zip(factors, other.factors[module], strict=True):
            assert given.dtype == made.dtype
            assert torch.equal(given, made), module


@pytest.mark.parametrize("layers", [None, 2])
def test_mlx_lm_computes_what_peft_does(
    model: Any, directory: Path, tmp_path: Path, layers: int | None
) -> None:
    state = tiny.adapter(model, seed=1)
    write_mlx(state, tmp_path / "mlx", layers)
    expected = tiny.PeftReference(model, {"one": state}).logits("one", PROMPT)
    found = mlx_logits(directory, tmp_path / "mlx", PROMPT)
    assert (found - expected).abs().max() < 1e-4
    assert (expected - torch_logits(model, PROMPT)).abs().max() > 1


def test_mlx_lm_takes_uneven_layers_and_the_head(
    model: Any, directory: Path, tmp_path: Path
) -> None:
    names = [
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "lm_head",
    ]
    state = tiny.adapter(model, seed=2, names=names)
    write_mlx(state, tmp_path / "mlx")
    expected = tiny.PeftReference(model, {"one": state}).logits("one", PROMPT)
    assert (mlx_logits(directory, tmp_path / "mlx", PROMPT) - expected).abs().max() < 1e-4


def test_mlx_names_only_the_layers_it_needs(model: Any, directory: Path, tmp_path: Path) -> None:
    state = tiny.adapter(model, seed=3, names=["model.layers.1.mlp.down_proj"])
    write_mlx(state, tmp_path / "mlx", 2)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["num_layers"] == 1
    assert config["lora_parameters"]["keys"] == ["mlp.down_proj"]
    expected = tiny.PeftReference(model, {"one": state}).logits("one", PROMPT)
    assert (mlx_logits(directory, tmp_path / "mlx", PROMPT) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_to_mlx_to_peft_is_exact(model: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    drawn = tiny.adapter(model, seed=4, rank=3, scaling=7 / 3)
    factors = {n: Factors(f.A.to(dtype), f.B.to(dtype)) for n, f in drawn.factors.items()}
    state = AdapterState(factors, drawn.scaling, base="org/model", extra={"lora_dropout": 0.1})
    state.save(tmp_path / "one")
    write_mlx(read_peft(tmp_path / "one").state, tmp_path / "mlx")
    back = read_mlx(tmp_path / "mlx").state
    back.save(tmp_path / "two")
    same(state, back)
    assert back.base == "org/model"
    one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    configs = [(tmp_path / n / "adapter_config.json").read_text() for n in ("one", "two")]
    assert configs[0] == configs[1]


def test_gpt2_names_are_refused_for_mlx(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"transformer\.h\.0"):
        write_mlx(tiny.adapter(tiny.model("gpt2"), seed=1), tmp_path / "mlx")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}},
        {"alpha_pattern": {"v_proj": 2}, "rank_pattern": {r"^model\.layers\.0\..*up_proj": 8}},
        {"use_rslora": True, "alpha_pattern": {"o_proj": 11}, "rank_pattern": {"o_proj": 2}},
    ],
)
def test_patterns_and_rslora_become_one_rank_and_scaling(
    model: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    theirs = saved_by_peft(model, tmp_path / "given", **options)
    reading = read_peft(tmp_path / "given")
    reading.state.save(tmp_path / "made")
    ours = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "made").eval()
    difference = torch_logits(ours, PROMPT) - torch_logits(theirs, PROMPT)
    assert difference.abs().max() < 1e-4
    assert bool(reading.notes) == ("rank_pattern" in options or "alpha_pattern" in options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "'pissa'.*path_initial_model"),
        ({"init_lora_weights": "olora"}, "'olora'"),
    ],
)
def test_what_is_not_plain_lora_is_named(
    model: Any, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    saved_by_peft(model, tmp_path, **options)
    with pytest.raises(UserError, match=said):
        read_peft(tmp_path)


def damaged(path: Path, model: Any, **changes: Any) -> Path:
    """An adapter directory with some fields of its config changed."""
    tiny.adapter(model, seed=6).save(path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 5}, "says rank 5, its tensors 4"),
        ({"lora_alpha": float("nan")}, "finite"),
        ({"lora_alpha": "16"}, "expected a number"),
        ({"lora_alpha": 0}, "scaling is 0"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": ["LORA"]}, "not plain LoRA"),
        ({"alpha_pattern": {"q_proj": 1e308, "k_proj": 1e-300}}, "NaN or infinity"),
        ({"bias": "all"}, "bias"),
        ({"alpha_pattern": {"(a|a)*b": 2}}, "too elaborate"),
        ({"alpha_pattern": {"(": 2}}, "no regular expression"),
        ({"alpha_pattern": [1]}, "table of module names"),
    ],
)
def test_damaged_configs_are_refused(
    model: Any, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        read_peft(damaged(tmp_path, model, **changes))


def test_modules_switched_off_stay_off(model: Any, tmp_path: Path) -> None:
    off = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"), 0)
    theirs = saved_by_peft(model, tmp_path / "given", alpha_pattern=off)
    read_peft(tmp_path / "given").state.save(tmp_path / "made")
    ours = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "made").eval()
    assert (torch_logits(ours, PROMPT) - torch_logits(theirs, PROMPT)).abs().max() < 1e-4
    assert (torch_logits(theirs, PROMPT) - torch_logits(model, PROMPT)).abs().max() > 0.1


def spoil(path: Path, key: str, tensor: torch.Tensor | None) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    if tensor is None:
        del tensors[key]
    else:
        tensors[key] = tensor
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("part", "tensor", "said"),
    [
        ("lora_A.weight", torch.randn(5, 64), r"A is \(5, 64\) and B"),
        ("lora_A.weight", torch.randn(256), r"expected \(r, in\)"),
        ("lora_A.weight", torch.full((4, 64), float("inf")), "NaN or infinity"),
        ("lora_A.weight", torch.ones(4, 64, dtype=torch.int8), "int8"),
        ("lora_B.weight", None, "lora_A but no lora_B"),
        ("lora_magnitude_vector", torch.randn(64), "is no factor"),
    ],
)
def test_damaged_tensors_are_refused(
    model: Any, tmp_path: Path, part: str, tensor: torch.Tensor | None, said: str
) -> None:
    tiny.adapter(model, seed=7).save(tmp_path)
    spoil(tmp_path, f"base_model.model.model.layers.0.self_attn.q_proj.{part}", tensor)
    with pytest.raises(UserError, match=said):
        read_peft(tmp_path)


def test_pickles_are_refused(model: Any, tmp_path: Path) -> None:
    tiny.adapter(model, seed=8).save(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin.*refused"):
        read_peft(tmp_path)
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapters.npz")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}})
    )
    with pytest.raises(UserError, match=r"adapters\.npz.*refused"):
        read_mlx(tmp_path)


def test_truncated_files_are_refused(model: Any, tmp_path: Path) -> None:
    tiny.adapter(model, seed=9).save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not JSON"):
        read_peft(tmp_path)


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_mlx_dora_and_full_are_refused(model: Any, tmp_path: Path, kind: str) -> None:
    write_mlx(tiny.adapter(model, seed=10), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "fine_tune_type": kind}))
    with pytest.raises(UserError, match=f"fine_tune_type is '{kind}'"):
        read_mlx(tmp_path)
