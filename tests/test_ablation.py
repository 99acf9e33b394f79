"""Ablations: what a variant adds up to, what is run again after a stop, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from loralab import config as configs
from loralab import pipeline
from loralab.adapters import LSLoraConfig
from loralab.config import AblationConfig
from loralab.errors import UserError
from loralab.gradient import ablation
from loralab.gradient.events import Remark
from loralab.run import Run


def values(model: Path | str = "smollm2", data: Path | str = "data.jsonl") -> dict[str, Any]:
    return {
        "kind": "ablation",
        "name": "tiny",
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "seeds": [0, 1],
        "run": {
            "data": {"path": str(data), "test_share": 0.25},
            "adapter": {"type": "lslora", "rank": 4, "target_modules": ["q_proj"]},
            "training": {"steps": 3, "batch_size": 2, "max_length": 64},
            "evaluation": {"limit": 3},
            "generation": {"max_new_tokens": 4},
        },
        "variants": [
            {"name": "V0", "after": None, "set": {"adapter.type_options.k_max": 1.0}},
            {"name": "V1", "says": "warmer", "set": {"training.lr": 1e-3}},
            {"name": "V2", "set": {"adapter.type_options.gated": True}},
            {"name": "LoRA", "after": None, "set": {"adapter.type": "lora"}},
            {"name": "hot", "after": "LoRA", "set": {"training.lr": 1e-2}},
        ],
    }


def parse(given: dict[str, Any]) -> AblationConfig:
    parsed = configs.parse(given, "test")
    assert isinstance(parsed, AblationConfig)
    return parsed


def test_variants_add_up_from_what_they_start_from() -> None:
    config = parse(values())
    v2 = config.config_of("V2", 1)
    assert v2.seed == 1
    assert v2.training.lr == 1e-3
    assert v2.adapter is not None
    assert v2.adapter.type_options == {"k_max": 1.0, "gated": True}
    hot = config.config_of("hot", 0)
    assert hot.adapter is not None
    assert (hot.adapter.type, hot.training.lr, hot.adapter.type_options) == ("lora", 1e-2, {})
    assert config.config_of("LoRA", 0).training.lr == configs.TrainingConfig(steps=1).lr


@pytest.mark.parametrize(
    ("variant", "what"),
    [
        ({"name": "bad", "set": {"training.lrr": 1.0}}, r"variant bad: unknown key training\.lrr"),
        ({"name": "bad", "after": "nobody"}, "name another variant"),
        ({"name": "V1"}, "different names"),
    ],
)
def test_a_wrong_variant_is_named_before_anything_runs(variant: dict[str, Any], what: str) -> None:
    given = values()
    given["variants"].append(variant)
    with pytest.raises(UserError, match=what) as caught:
        parse(given)
    assert "\n" not in str(caught.value)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"aa b{c}", "completion": f" c{c} dd"} for c in "abcdefgh"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = values(tmp_path / "model", tmp_path / "data.jsonl")
    made["variants"] = made["variants"][1:4]
    made["variants"][0]["after"] = None
    return made


def test_every_variant_runs_with_every_seed_and_the_table_is_their_means(
    given: dict[str, Any], tmp_path: Path
) -> None:
    said: list[Any] = []
    run, result = pipeline.start(parse(given), tmp_path / "run", said.append)
    assert result.complete
    rows = run.metrics()
    assert [(r["variant"], r["seed"]) for r in rows] == [
        (v, s) for s in (0, 1) for v in ("V1", "V2", "LoRA")
    ]
    assert sum(isinstance(event, Remark) for event in said) == 6
    table = json.loads((run.path / "ablation.json").read_text())
    first = [r["held_out_loss"] for r in rows if r["variant"] == "V1"]
    assert table[0]["held_out_loss"][0] == pytest.approx(sum(first) / 2)
    assert table[0]["seeds"] == 2
    assert table[2]["deviation"] is None, "LoRA has no spline"
    assert table[1]["deviation"] is not None
    v1 = [r for r in rows if r["variant"] == "V1"]
    assert [line["step"] for line in v1[0]["spline_during"]] == [1, 3]
    assert all(0 <= line["outside"] <= 1 for line in v1[0]["spline_during"])
    assert table[0]["outside"][0] == pytest.approx((sum(r["spline"]["outside"] for r in v1)) / 2)
    assert v1[0]["spline"]["deviation"] > v1[0]["spline_during"][0]["deviation"] > 0
    assert all(r["spline"] is None for r in rows if r["variant"] == "LoRA")
    text = (run.path / "ablation.md").read_text()
    assert "| V1 | warmer |" in text
    assert len({r["held_out_loss"] for r in rows}) == 6, "variants and seeds differ"


def test_the_shipped_ablation_mends_one_fault_at_a_time() -> None:
    config = configs.load("lslora-ablation", [])
    assert isinstance(config, AblationConfig)
    assert config.seeds == (0, 1, 2)

    def settings(name: str) -> dict[str, Any]:
        made = config.config_of(name, 0)
        assert made.adapter is not None
        own = {"lr": made.training.lr, "optimizer": made.training.optimizer}
        return {"type": made.adapter.type, **own, **made.adapter.type_options}

    mended = [
        {"spline_init"}, {"k_min", "k_max"}, {"normalize"}, {"output_scale_init"},
        {"interpolation_method"}, {"spline_reg_weight"}, {"lr", "optimizer"},
    ]  # fmt: skip
    steps = [settings(f"V{number}") for number in range(8)]
    for before, after, keys in zip(steps[:-1], steps[1:], mended, strict=True):
        assert {key for key in after if after[key] != before[key]} == keys
    # Nothing is left to mend: V7 is what a user gets who sets nothing.
    last = steps[-1]
    kind, lr, optimizer = (last.pop(key) for key in ("type", "lr", "optimizer"))
    default = configs.TrainingConfig(steps=1)
    assert (kind, lr, optimizer) == ("lslora", default.lr, default.optimizer)
    assert LSLoraConfig(**last).variant().config.resolved_spline_init == "identity"  # type: ignore[attr-defined]
    for name, value in last.items():
        if name != "spline_init":
            assert getattr(LSLoraConfig(), name) == value
    for name, kind in (("LoRA", "lora"), ("SineLoRA", "sinelora")):
        assert settings(name) == {"type": kind, "lr": lr, "optimizer": optimizer}


def test_a_stopped_ablation_goes_on_with_what_is_missing(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(given)
    whole, _ = pipeline.start(config, tmp_path / "whole", lambda _: None)
    made: list[tuple[str, int]] = []
    original = ablation._one

    def counted(sft: Any, name: str, seed: int, run: Run) -> dict[str, Any]:
        made.append((name, seed))
        return original(sft, name, seed, run)

    monkeypatch.setattr(ablation, "_one", counted)
    with Run.create(tmp_path / "cut", config.to_dict()) as run:
        assert not ablation.ablate(config, run, stopping=lambda: len(made) == 2).complete
    resumed, result = pipeline.resume(tmp_path / "cut", None, lambda _: None)
    assert result.complete
    assert len(made) == len(set(made)) == 6

    def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]

    assert timeless(resumed.metrics()) == timeless(whole.metrics())
