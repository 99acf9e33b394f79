"""The whole path with real engines over tiny models: from a config to adapters that PEFT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
from loralab.config import EvolveConfig, parse
from loralab.errors import UserError
from loralab.evolution.outputs import save_merged
from loralab.evolution.replay import replay
from loralab.evolution.trainer import Result, evolve
from loralab.evolution.workbench import open_batched
from loralab.run import Run


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / str(request.param)
    tiny.model(request.param).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def config_for(model_dir: Path, noise_on: str, **adapter: Any) -> EvolveConfig:
    values = {
        "kind": "evolve",
        "name": "tiny",
        "model": str(model_dir),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "task": {"name": "conciseness"},
        "adapter": {"rank": 4, "alpha": 8.0, **adapter},
        "evolution": {
            "generations": 3,
            "population": 4,
            "noise_on": noise_on,
            "eval_every": 2,
            "scale": {"fraction": 0.3},
            "shaping": "centered_rank",
        },
        "generation": {"max_new_tokens": 12},
    }
    return parse(values, "test")


def run_config(path: Path, config: EvolveConfig, resume: bool = False) -> tuple[Result, Run]:
    values: dict[str, Any] = config.to_dict()
    with Run.resume(path, values) if resume else Run.create(path, values) as run:
        return evolve(config, run), run


@pytest.mark.parametrize("noise_on", ["B", "AB", "weights"])
def test_a_resumed_search_over_a_model_ends_in_the_same_bits(
    model_dir: Path, tmp_path: Path, noise_on: str
) -> None:
    config = config_for(model_dir, noise_on)
    whole, run = run_config(tmp_path / "whole", config)
    assert whole.complete
    assert len({row["reward_mean"] for row in run.metrics()[:3]}) > 1
    assert all(row["failed"] == 0 for row in run.metrics()[:3])

    _, cut = run_config(tmp_path / "cut", config)
    lines = cut.journal_path.read_bytes().splitlines(True)
    cut.journal_path.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    resumed, again = run_config(tmp_path / "cut", config, resume=True)
    assert resumed.digest == whole.digest
    assert again.journal_path.read_bytes() == run.journal_path.read_bytes()


@pytest.mark.parametrize("init", ["pissa", "orthogonal", "tiny"])
def test_a_search_from_another_start_resumes_and_saves_for_the_true_base(
    model_dir: Path, tmp_path: Path, init: str
) -> None:
    config = config_for(model_dir, "AB", init=init)
    whole, run = run_config(tmp_path / "whole", config)
    plain, _ = run_config(tmp_path / "plain", config_for(model_dir, "AB"))
    if init != "tiny":  # the base's own answers at the start, whatever the factors
        assert plain.start is not None
        assert whole.start == plain.start

    _, cut = run_config(tmp_path / "cut", config)
    lines = cut.journal_path.read_bytes().splitlines(True)
    cut.journal_path.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    resumed, again = run_config(tmp_path / "cut", config, resume=True)
    assert resumed.digest == whole.digest
    assert again.journal_path.read_bytes() == run.journal_path.read_bytes()

    # What PEFT reads on the base as it is does what the engine ran on the base less the start.
    state = replay(run)
    centre = state.space.centre(state.master)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    loaded = PeftModel.from_pretrained(base, run.checkpoints / "final").merge_and_unload()
    expected = AutoModelForCausalLM.from_pretrained(model_dir)
    assert centre.adapter is not None
    assert (centre.change is not None) == (init == "pissa")
    for name, (a, b) in centre.adapter.factors.items():
        module = expected.get_submodule(name)
        change = centre.adapter.scaling * b @ a + (centre.change or {}).get(name, 0.0)
        module.weight.data += change.T if type(module).__name__ == "Conv1D" else change
    for one, other in zip(loaded.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "what"),
    [
        ({"init": "mica"}, "A of .* is zero"),
        ({"init": "loftq"}, "replaced"),
        ({"init": "progressive"}, "progressive"),
        ({"type": "lslora"}, "type: lora"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_cannot_be_searched_says_so(
    model_dir: Path, tmp_path: Path, adapter: dict[str, Any], what: str
) -> None:
    with pytest.raises(UserError, match=what):
        run_config(tmp_path / "run", config_for(model_dir, "B", **adapter))


def test_peft_reads_the_adapter_as_it_was(model_dir: Path, tmp_path: Path) -> None:
    config = config_for(model_dir, "AB")
    _, run = run_config(tmp_path / "run", config)
    state = replay(run)
    centre = state.space.centre(state.master).adapter
    assert centre is not None
    assert all(bool(f.B.any()) for f in centre.factors.values())
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_dir), run.checkpoints / "final"
    )
    for name, (a, b) in centre.factors.items():
        layer = loaded.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == centre.scaling == 2.0
        assert torch.equal(layer.lora_A["default"].weight, a)
        assert torch.equal(layer.lora_B["default"].weight, b)


def test_the_merged_model_is_base_plus_change(model_dir: Path, tmp_path: Path) -> None:
    config = config_for(model_dir, "weights")
    _, run = run_config(tmp_path / "run", config)
    assert (run.path / "merged" / "model.safetensors").exists()
    state = replay(run)
    save_merged(state, open_batched(config), tmp_path / "merged")
    change = state.space.centre(state.master).change
    assert change is not None
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    changed = {f"{name}.weight" for name in change}
    for name, weight in merged.state_dict().items():
        before = base.state_dict()[name]
        if name not in changed:
            assert torch.equal(weight, before), name
            continue
        delta = change[name.removesuffix(".weight")]
        expected = before + (delta.t() if "gpt2" in model_dir.name else delta)
        torch.testing.assert_close(weight, expected)
    assert all(bool(c.any()) for c in change.values())
