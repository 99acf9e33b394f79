"""DPO, GRPO and the verifier on quantised bases: they learn, and the reference is that base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import test_dpo
import test_grpo
import test_verifier
import tiny
from loralab import pipeline
from loralab.adapters.attach import attach
from loralab.adapters.true_base import true_base
from loralab.config import AdapterConfig, TrainingConfig, parse
from loralab.config.dpo import PreferenceConfig
from loralab.errors import UserError
from loralab.gradient.dpo import reference_of, train_pairs
from loralab.gradient.rows import Row
from loralab.gradient.verify import SCORES, load_verifier
from loralab.models.load import load
from loralab.run import Run

pytest.importorskip("bitsandbytes")
BITS = ("nf4", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and pairs, and a model of widths that bitsandbytes' CPU kernels take."""
    path = test_dpo.hh_folder(tmp_path_factory.mktemp("qlora"))
    rows = [{"prompt": tiny.words(3, i), "completion": "bc"} for i in range(20)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    tiny.save_quantisable(path / "model")
    return path


def config_for(folder: Path, kind: str, bits: str) -> Any:
    short = {"quantization": bits, "dtype": "bfloat16"}
    if kind == "dpo":
        return test_dpo.config_for(folder, **short)
    if kind == "grpo":
        return test_grpo.config_for(folder, grpo={"group": 8, "beta": 0.1}, **short)
    return test_verifier.config_for(folder, **short)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["dpo", "grpo", "verifier"])
def test_a_run_learns_on_a_quantised_base(
    folder: Path, tmp_path: Path, kind: str, bits: str
) -> None:
    config = config_for(folder, kind, bits)
    _, result = pipeline.start(config, tmp_path / "run", lambda event: None)
    assert result.complete
    run = Run.open(tmp_path / "run")
    assert run.environment()["kernel"].startswith("torch")
    before, *steps, after = run.metrics()
    if kind == "dpo":
        assert before["held_out_reward"] == pytest.approx(0, abs=0.02)
        assert after["held_out_reward"] > 0.1
    elif kind == "grpo":
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-3)
        assert steps[-1]["kl"] > 10 * abs(steps[0]["kl"])
        assert steps[-1]["reward_mean"] > steps[0]["reward_mean"]
    else:
        verifier, _ = load_verifier(run.path, config)
        assert getattr(verifier.model.get_base_model(), "quantization_method", None) is not None
        wanted = [s for line in (run.path / SCORES).open() for s in json.loads(line)["scores"]]
        made = [json.loads(line) for line in (run.path / "candidates.jsonl").open()]
        rows = [
            Row((*m["prompt"], *m["tokens"]), (-100,) * len(m["prompt"]) + tuple(m["tokens"]))
            for m in made
        ]
        assert len(set(wanted)) > 5
        # Other batches than the run's, so bf16 rounds otherwise.
        assert verifier.score(rows) == pytest.approx(wanted, abs=3e-2)


@pytest.mark.parametrize("bits", BITS)
def test_the_reference_is_the_quantised_base(folder: Path, bits: Any) -> None:
    model, _ = load(folder / "model", "float32", quantization=bits)
    row = test_dpo.some_pairs(1)[0].chosen
    with torch.no_grad():
        wanted = float(test_dpo.answer_log_prob(model, row))
    model = attach(model, AdapterConfig(rank=4, alpha=8.0), 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
        moved = float(test_dpo.answer_log_prob(model, row))
        with true_base(model):
            assert float(test_dpo.answer_log_prob(model, row)) == pytest.approx(wanted, abs=1e-6)
    assert abs(moved - wanted) > 0.1
    plain = float(test_dpo.plain_loss(model, test_dpo.some_pairs(5), 0.3))
    history = train_pairs(
        model, tiny.tokenizer(), test_dpo.some_pairs(5),
        TrainingConfig(steps=1, batch_size=5, lr=1e-3), PreferenceConfig(beta=0.3), 0,
        reference=reference_of(model, "base"),
    )  # fmt: skip
    assert history.losses[0] == pytest.approx(plain, abs=1e-4 if bits == "nf4" else 5e-3)


@pytest.mark.parametrize("kind", ["dpo", "grpo", "verifier"])
def test_quantised_weights_are_not_trained_whole(folder: Path, kind: str) -> None:
    values = config_for(folder, kind, "nf4").to_dict()
    with pytest.raises(UserError, match="quantised weights cannot be trained"):
        parse({**values, "full": True, "adapter": None}, "test")


def test_kinds_that_cannot_say_so(folder: Path) -> None:
    values = {"kind": "classify", "name": "x", "model": "x", "task": {"name": "sst2"}}
    with pytest.raises(UserError, match="quantization"):
        parse({**values, "training": {"steps": 1}, "quantization": "nf4"}, "test")
