"""`report_to`: each step's numbers reach a tracker; one that is not there is said in one line.

The trackers themselves are not among what loralab installs: a stand-in takes TensorBoard's place.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tiny
from loralab.config import TrainingConfig, parse
from loralab.errors import UserError
from loralab.gradient import loop
from loralab.gradient.sft import train
from test_sft import peft_model, some_rows


class Writer:
    """What TensorBoard's writer was given."""

    scalars: dict[str, list[tuple[int, float]]] = {}  # noqa: RUF012  emptied by the test

    def __init__(self, log_dir: str) -> None:
        self.place = Path(log_dir)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        Writer.scalars.setdefault(name, []).append((step, value))

    def add_text(self, *_: Any) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_each_step_reaches_the_tracker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.SummaryWriter = Writer  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    Writer.scalars.clear()
    settings = TrainingConfig(steps=3, batch_size=2, lr=1e-2, report_to=("tensorboard",))
    history = train(
        peft_model(), tiny.tokenizer(), some_rows(), settings, seed=0, output_dir=tmp_path
    )
    given = Writer.scalars
    assert given["train/loss"] == [(i, loss) for i, loss in enumerate(history.losses, 1)]
    assert [value for _, value in given["train/grad_norm"]] == list(history.grad_norms)
    assert {"train/learning_rate", "train/tokens", "train/seconds"} <= given.keys()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(
    name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(loop, "find_spec", lambda n: None if n == name else there(n))
    settings = TrainingConfig(steps=1, batch_size=2, report_to=(name,))
    with pytest.raises(UserError, match=f"report_to: {name} is not installed; pip install {name}"):
        train(peft_model(), tiny.tokenizer(), some_rows(), settings, seed=0)


def test_a_tracker_of_another_name_is_refused_with_the_config() -> None:
    values = {"kind": "sft", "name": "x", "model": "x", "data": {"path": "x"}}
    with pytest.raises(UserError, match=r"report_to.*tensorboard"):
        parse({**values, "training": {"steps": 1, "report_to": ["tensorbord"]}}, "test")
