"""The doctor's verdicts, on adapters that stock PEFT made and on those of this package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig
from safetensors.torch import load_file, save_file

import loralab
import small_language as language
from doctor_cases import (
    base_in,
    examined,
    keys_dropped,
    random_factors,
    rewrite_config,
    rewrite_tensors,
    saved,
    tokenizer_of,
)
from loralab.adapters import LSLoraConfig, SineLoraConfig
from loralab.adapters.interop import write_mlx
from loralab.adapters.state import AdapterState
from loralab.errors import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_in(tmp_path_factory)


@pytest.fixture
def sound(base: Path, tmp_path: Path) -> Path:
    """A plain adapter, trained a little."""
    return saved(language.adapted(base), tmp_path / "adapter")


SOUND: dict[str, Callable[[Path], Any]] = {
    "lora": lambda base: language.adapted(base),
    "rslora of rank 8": lambda base: language.adapted(base, r=8, use_rslora=True),
    "dora": lambda base: language.adapted(base, use_dora=True),
    "pissa": lambda base: language.adapted(base, init_lora_weights="pissa"),
    "loha": lambda base: language.adapted(
        base, LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ),
}


@pytest.mark.parametrize("kind", SOUND)
def test_sound_adapters_of_stock_peft(kind: str, base: Path, tmp_path: Path) -> None:
    report = examined(saved(SOUND[kind](base), tmp_path / "a"))
    assert report.sound, report
    assert not [one for one in report.findings if one.severity == "fail"]


def both_random(base: Path, directory: Path) -> Path:
    model = language.adapted(base, steps=0)
    random_factors(model)
    return saved(model, directory)


def never_started(base: Path, directory: Path) -> Path:
    """Both factors as `nn.Linear` makes them."""
    made = language.adapted(base, steps=0, init_lora_weights=False, lora_alpha=32)
    return saved(made, directory)


def wrong_scaling(base: Path, directory: Path) -> Path:
    saved(language.adapted(base, steps=40), directory)
    rewrite_config(directory, lora_alpha=800.0)
    return directory


def not_numbers(base: Path, directory: Path) -> Path:
    saved(language.adapted(base), directory)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[3]][0, 0] = float("nan")

    rewrite_tensors(directory, spoil)
    return directory


BROKEN: dict[Callable[[Path, Path], Path], str | None] = {
    both_random: None,
    never_started: None,
    wrong_scaling: None,
    not_numbers: "numbers.nan",
    keys_dropped: "save.keys_dropped",
}


@pytest.mark.parametrize("fault", BROKEN, ids=lambda fault: fault.__name__)
def test_broken_adapters_of_stock_peft(
    fault: Callable[[Path, Path], Path], base: Path, tmp_path: Path
) -> None:
    report = examined(fault(base, tmp_path / "a"))
    assert report.verdict == "broken", report
    cause = BROKEN[fault]
    if cause is not None:
        assert report.causes[0] == cause
    assert str(report).splitlines()[0].endswith("BROKEN")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["sound"] is False


def test_pissa_without_its_residual_is_noticed(base: Path, tmp_path: Path) -> None:
    directory = saved(language.adapted(base, init_lora_weights="pissa"), tmp_path / "a")
    with_it = examined(directory).readings[-1].values
    # PiSSA's factors, said to be plain LoRA's: PEFT takes nothing out of W then.
    rewrite_config(directory, init_lora_weights=True)
    report = examined(directory)
    without = report.readings[-1].values
    assert without["weights.base_share"] == pytest.approx(1.0, abs=0.05)
    assert without["kl"] > 100 * with_it["kl"]
    assert abs(with_it["weights.base_share"]) < 0.5
    assert report.verdict != "sound"


def test_a_pattern_of_module_names_as_tools_write_it_is_fine(base: Path, tmp_path: Path) -> None:
    pattern = r"(?:.*?(?:layers).*?(?:self_attn|mlp).*?(?:q_proj|down_proj))|(?:\bno[\d]{1,}\.x)"
    config = LoraConfig(r=4, target_modules=pattern, task_type="CAUSAL_LM")
    report = examined(saved(language.adapted(base, config), tmp_path / "a"))
    assert report.sound, report


@pytest.mark.parametrize("config", [LSLoraConfig, SineLoraConfig])
def test_nonlinear_adapters(config: Any, base: Path, tmp_path: Path) -> None:
    settings = config(r=4, lora_alpha=8.0, target_modules=["q_proj", "v_proj"])
    directory = saved(language.adapted(base, settings), tmp_path / "a")
    report = examined(directory)
    assert report.sound, report
    values = report.readings[-1].values
    assert ("spline.outside" in values) == (config is LSLoraConfig)

    def only_factors(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "spline" in name]:
            del tensors[name]

    if config is LSLoraConfig:
        rewrite_tensors(directory, only_factors)
        report = examined(directory)
        assert (report.verdict, report.causes[0]) == ("broken", "save.keys_dropped")


def test_an_adapter_of_mlx(base: Path, sound: Path, tmp_path: Path) -> None:
    state = AdapterState.load(sound)
    directory = tmp_path / "mlx"
    write_mlx(state, directory)
    report = examined(directory, base)
    assert report.kind == "MLX"
    assert report.sound, report
    peft = examined(sound)
    key = "weights.delta_ratio.max"
    assert report.readings[0].values[key] == pytest.approx(peft.readings[0].values[key], rel=1e-4)
    tensors = load_file(directory / "adapters.safetensors")
    tensors[sorted(tensors)[0]][0, 0] = float("inf")
    save_file(tensors, directory / "adapters.safetensors")
    assert examined(directory, base).causes[0] == "numbers.nan"


def test_a_model_in_memory_is_left_as_it_was(base: Path) -> None:
    model = language.adapted(base)
    model.train()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wants, rng = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    options: dict[str, Any] = {"prompts": language.prompts(), "max_new_tokens": 12}
    first = loralab.doctor(model, tokenizer=tokenizer_of(base), **options)
    again = loralab.doctor(model, tokenizer=tokenizer_of(base), **options)
    assert first.sound, first
    assert dict(first.readings[0].values) == pytest.approx(
        dict(again.readings[0].values), rel=0, abs=0, nan_ok=True
    )
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == wants
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    random_factors(model)
    assert not loralab.doctor(model, tokenizer=tokenizer_of(base), **options).sound
    with pytest.raises(UserError, match="tokenizer"):
        loralab.doctor(model)


def test_a_base_in_memory_stays_as_it_is(base: Path, sound: Path) -> None:
    model = language.open_base(base)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = loralab.doctor(
        sound, model, tokenizer=tokenizer_of(base), prompts=language.prompts(), max_new_tokens=12
    )
    assert report.sound, report
    assert not hasattr(model, "peft_config")
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_an_adapter_that_changes_nothing_is_told(base: Path, tmp_path: Path) -> None:
    report = examined(saved(language.adapted(base, steps=0), tmp_path / "a"))
    assert "weights.idle" in [one.rule for one in report.findings]


def test_rows_it_learned_are_examined_too(base: Path, sound: Path, tmp_path: Path) -> None:
    good = language.write_rows(tmp_path / "good.jsonl", language.rows(language.starts_of()))
    values = examined(sound, data=good).readings[-1].values
    assert values["data.rows"] == len(language.starts_of())
    assert values["data.shuffled"] <= 0.1
    order = language.starts_of()
    turned = [
        {"prompt": a["prompt"], "completion": b["completion"]}
        for a, b in zip(language.rows(order), language.rows([*order[9:], *order[:9]]), strict=True)
    ]
    shuffled = language.write_rows(tmp_path / "shuffled.jsonl", turned)
    crossed = examined(sound, data=shuffled).readings[-1].values
    assert crossed["data.shuffled"] > 0.2
    assert crossed["data.pair_gain"] < values["data.pair_gain"] / 2
    other = language.write_rows(tmp_path / "other.jsonl", [{"left": "a", "right": "b"}] * 2)
    with pytest.raises(UserError, match="its columns are left, right"):
        examined(sound, data=other)
