"""A config's `adapter.init`: its texts and options are used, what it cannot be is refused."""

from __future__ import annotations

from math import sqrt
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from loralab.adapters.attach import attach
from loralab.adapters.inits import initialize
from loralab.adapters.inits.initialize import options_of
from loralab.config import AdapterConfig, InitConfig
from loralab.errors import UserError
from loralab.gradient.fine_tune import trainable
from loralab.gradient.rows import prepare
from starts import (
    ALPHA,
    RANK,
    factors,
    layers,
    peft_model,
    texts,
)


def test_options_of_a_config() -> None:
    init = InitConfig(name="eva", options={"texts": ["mine"], "rho": 2})
    assert options_of(init, ["the run's"]) == {"texts": ["mine"], "rho": 2}
    assert options_of(InitConfig(name="eva"), ["a"]) == {"texts": ["a"]}
    for option in ("seed", "tokenizer", "adapter"):
        with pytest.raises(UserError, match=rf"options\.{option} is 3"):
            options_of(InitConfig(name="eva", options={option: 3}), [])
    with pytest.raises(UserError, match="texts is 5"):
        initialize(peft_model(), "eva", tokenizer=tiny.tokenizer(), texts=5)  # type: ignore[arg-type]


class Notes:
    """A run directory as `trainable` sees it."""

    def note(self, **values: Any) -> None:
        vars(self).update(values)


def trained_from(**adapter: Any) -> Any:
    section = AdapterConfig.model_validate({"rank": RANK, "alpha": ALPHA, **adapter})
    tokenizer = tiny.tokenizer()
    tokenizer.decode = lambda ids, **_: " ".join(tokenizer.convert_ids_to_tokens(ids))
    rows = prepare([("aa bb", text, "row") for text in texts()], tokenizer, 99).rows
    config: Any = SimpleNamespace(adapter=section, seed=3, model="base")
    return trainable(tiny.model("llama"), tokenizer, config, rows, Notes())  # type: ignore[arg-type]


def test_a_config_s_texts_and_zero_b_s_options_are_used() -> None:
    own = {"name": "eva", "options": {"texts": texts(seed=9)}}
    used, other = trained_from(init=own), trained_from(init={"name": "eva"})
    plain = attach(tiny.model("llama"), AdapterConfig(rank=RANK, alpha=ALPHA), 3)
    initialize(plain, "eva", tokenizer=tiny.tokenizer(), texts=texts(seed=9), seed=3)
    key = next(iter(layers(used)))
    assert torch.equal(factors(used)[key].A, factors(plain)[key].A)
    assert not torch.equal(factors(other)[key].A, factors(plain)[key].A)
    with pytest.raises(UserError, match=r"options\.seed"):
        trained_from(init={"name": "eva", "options": {"seed": 1}})
    gaussian = trained_from(init={"name": "zero_b", "options": {"a": "gaussian"}})
    a = torch.cat([pair.A.flatten() * sqrt(pair.A.shape[1]) for pair in factors(gaussian).values()])
    assert float(a.std()) == pytest.approx(1, abs=0.05), "kaiming's is 0.58"


@pytest.mark.parametrize("kind", ["lslora", "sinelora"])
def test_a_config_that_would_lose_its_run_at_the_end_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="pissa is for plain LoRA"):
        trained_from(type=kind, init={"name": "pissa"})
