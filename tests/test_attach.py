"""From an `adapter` section, in anyone's words, to a PEFT model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from loralab.adapters.attach import attach, targeted_weights
from loralab.config import AdapterConfig, parse
from loralab.errors import UserError


def section(**values: Any) -> AdapterConfig:
    return AdapterConfig.model_validate(values)


def adapted(model: Any) -> set[str]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix) for n, m in model.named_modules() if hasattr(m, "lora_A")}


OURS = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    "theirs",
    [
        {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        {"rank": 4, "scale": 2.0, "dropout": 0.1, "keys": ["q_proj", "v_proj"]},
        {"rank": 4, "scale": 2, "dropout": 0.1, "keys": ["q_proj", "v_proj"]},
    ],
)
def test_peft_s_words_and_mlx_s_are_ours(theirs: dict[str, Any]) -> None:
    assert section(**theirs) == section(**OURS)


def test_a_scale_needs_no_rank_and_a_stored_section_reads_as_it_was() -> None:
    assert section(scale=20.0).alpha == 160.0
    stored = section(rank=4, scale=20.0, init="orthogonal", num_layers=1).model_dump(mode="json")
    assert section(**stored) == section(rank=4, scale=20.0, init="orthogonal", num_layers=1)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"rank": 4, "r": 4}, "rank or r, which are the same setting"),
        ({"alpha": 4.0, "scale": 1.0}, "alpha or scale"),
        ({"keys": ["q_proj"], "target_modules": ["q_proj"]}, "keys or target_modules"),
        ({"num_layers": 2, "layers_to_transform": [0]}, "not both"),
        ({"type_options": {"num_knots": 3}}, "no type_options with type: lora"),
        ({"lora_r": 4}, "unknown key adapter.lora_r"),
        ({"scale": "big"}, "adapter.alpha"),
    ],
)
def test_one_setting_in_two_dialects_is_an_error(values: dict[str, Any], what: str) -> None:
    whole = {
        "kind": "sft", "name": "x", "model": "m", "task": {"name": "t"},
        "training": {"steps": 1}, "adapter": values,
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        parse(whole, "test.yaml")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mlx_s_keys_and_layers_choose_the_last_layers() -> None:
    config = section(rank=4, scale=2.0, num_layers=1, keys=["self_attn.q_proj", "mlp.down_proj"])
    model = attach(tiny.model("llama"), config)
    assert adapted(model) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert adapted(attach(tiny.model("llama"), section(num_layers=-1, keys=["q_proj"]))) == {
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    }


def test_layers_to_transform_are_those_named() -> None:
    config = section(r=4, layers_to_transform=[0], target_modules="all-linear")
    model = attach(tiny.model("gpt2"), config)
    assert {name.split(".")[2] for name in adapted(model)} == {"0"}
    assert set(targeted_weights(tiny.model("gpt2"), config)) == adapted(model)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"num_layers": 3}, "expected 1 to 2"),
        ({"layers_to_transform": [0, 7]}, "no layer 7"),
        ({"target_modules": ["qq_proj"]}, "no linear module is named 'qq_proj'"),
        ({"type": "lslora", "type_options": {"knots": 3}}, "adapter.type_options"),
        ({"type": "lslora", "type_options": {"num_knots": 1}}, "num_knots"),
    ],
)
def test_what_is_not_in_the_model_is_named(values: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        attach(tiny.model("llama"), section(**values))


@pytest.mark.parametrize("kind", ["lora", "lslora", "sinelora"])
def test_every_type_is_attached_at_its_scaling_and_does_nothing_yet(kind: str) -> None:
    ids = torch.randint(4, 60, (1, 7))
    model = attach(tiny.model("llama"), section(type=kind, rank=4, alpha=6.0), seed=3).eval()
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert layer.scaling["default"] == 1.5
    assert adapted(model) == {
        n for n, m in tiny.model("llama").named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }  # fmt: skip
    with torch.no_grad():
        expected = tiny.model("llama")(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    again = attach(tiny.model("llama"), section(type=kind, rank=4, alpha=6.0), seed=3)
    other = again.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert torch.equal(other.lora_A["default"].weight, layer.lora_A["default"].weight)
