"""What is saved of an adapter whose start changed the base: converted, or refused as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from loralab.adapters.extract import state_of
from loralab.adapters.inits import initialize
from loralab.adapters.interop import read_peft
from loralab.errors import UserError
from loralab.gradient.outputs import save_trained
from loralab.registry import INITS
from loralab.run import Run
from starts import SPLITTING, logits, peft_model, shake, texts

CHANGING = sorted(
    n for n in INITS.names() if n != "warm_start" and INITS.load(n).facts.changes_base
)


def started(name: str, **options: Any) -> Any:
    model = peft_model()
    initialize(model, name, tokenizer=tiny.tokenizer(), texts=texts(), **options)
    shake(model)
    return model


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with Run.create(tmp_path / "run", {"kind": "sft"}) as made:
        yield made


def test_every_changing_start_is_tried_here() -> None:
    assert sorted([*SPLITTING, "loftq"]) == CHANGING


@pytest.mark.parametrize("name", SPLITTING)
def test_what_we_save_is_plain_lora_of_the_true_base(name: str, run: Run) -> None:
    model = started(name)
    save_trained(model, tiny.tokenizer(), "base", run)
    state = read_peft(run.adapter).state
    plain = tiny.model("llama")
    for module, (a, b) in state.factors.items():
        plain.get_submodule(module).weight.data += state.scaling * b @ a
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CHANGING)
def test_what_peft_saves_as_it_is_is_refused_with_the_mend(name: str, tmp_path: Path) -> None:
    started(name).save_pretrained(tmp_path, save_embedding_layers=False)
    mend = "saved beside it" if name == "loftq" else "path_initial_model_for_weight_conversion"
    with pytest.raises(UserError, match=f"{name}.*{mend}"):
        read_peft(tmp_path)


def test_a_replaced_base_is_not_left_behind_by_saving_the_adapter_alone(run: Run) -> None:
    with pytest.raises(UserError, match="save the base with the adapter"):
        save_trained(started("loftq"), tiny.tokenizer(), "base", run)


@pytest.mark.parametrize("name", ["pissa", "loftq"])
def test_another_start_afterwards_is_plain_again(name: str, tmp_path: Path) -> None:
    model = started(name)
    initialize(model, "orthogonal")
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    read = read_peft(tmp_path).state
    assert read.digest() == state_of(model).digest()
