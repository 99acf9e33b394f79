"""Ablations: what a variant adds up to, what is run again after a stop, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import tiny
from loralab import config as configs
from loralab import pipeline
from loralab.adapters import LSLoraConfig
from loralab.config import AblationConfig
from loralab.errors import UserError
from loralab.gradient import ablation
from loralab.gradient.events import Remark
from loralab.report import build_report
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
    page = (run.path / "report.html").read_text()
    assert "No generation" not in page
    for cell in ("warmer", "held-out correct", "spline moved", "Held-out completions"):
        assert f"{cell}<" in page
    assert text.splitlines()[-1].split(" | ")[3] in page, "the last variant's numbers"
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

    def counted(sft: Any, name: str, seed: int, *more: Any) -> dict[str, Any]:
        made.append((name, seed))
        return original(sft, name, seed, *more)

    monkeypatch.setattr(ablation, "_one", counted)
    with Run.create(tmp_path / "cut", config.to_dict()) as run:
        assert not ablation.ablate(config, run, stopping=lambda: len(made) == 2).complete
        page = build_report(run.path).read_text()
        assert "Unfinished: 2 of 6 runs so far." in page
    resumed, result = pipeline.resume(tmp_path / "cut", None, lambda _: None)
    assert result.complete
    assert len(made) == len(set(made)) == 6

    def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]

    assert timeless(resumed.metrics()) == timeless(whole.metrics())


def only(given: dict[str, Any], **changes: Any) -> AblationConfig:
    """One variant with one seed."""
    one = {"name": "one", "set": changes}
    adapter = {"type": "lora", "rank": 4, "target_modules": ["q_proj"]}
    return parse(
        {**given, "seeds": [0], "run": {**given["run"], "adapter": adapter}, "variants": [one]}
    )


def test_a_variant_can_train_on_a_quantised_base(given: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.save_quantisable(tmp_path / "model")
    losses = []
    for number, bits in enumerate((None, "nf4")):
        run, _ = pipeline.start(
            only(given, quantization=bits), tmp_path / f"run-{number}", lambda _: None
        )
        losses.append(run.metrics()[0]["held_out_loss"])
    assert losses[0] != losses[1]


def test_rows_that_are_evaluated_on_are_refused_or_left_out(
    given: dict[str, Any], tmp_path: Path
) -> None:
    leak = {"prompt": tiny.words(15, 1), "completion": tiny.words(2, 2)}
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps(leak) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(leak) + "\n")
    given["run"]["data"] = {
        "path": str(tmp_path / "data.jsonl"), "test_path": str(tmp_path / "test.jsonl")
    }  # fmt: skip
    with pytest.raises(UserError, match="contamination"):
        pipeline.start(only(given), tmp_path / "run", lambda _: None)
    said: list[Any] = []
    config = only(given, **{"contamination.action": "drop"})
    _, result = pipeline.start(config, tmp_path / "run", said.append)
    assert result.complete
    assert any("1 training rows left out" in event.text for event in said)


def test_a_guard_looks_where_it_is_asked_to(given: dict[str, Any], tmp_path: Path) -> None:
    assert only(given).config_of("one", 0).guard is None
    given["run"]["guard"] = {}
    hot = {"training.lr": 1e30, "training.max_grad_norm": 0.0}
    run, _ = pipeline.start(only(given, **hot), tmp_path / "run", lambda _: None)
    [row] = run.metrics()
    assert "warn weights.large" in row["findings"]
    assert (run.path / "guard" / "one-0" / "readings.jsonl").exists()


class Stops(TrainerCallback):  # type: ignore[misc]
    findings = ()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_training_stop = True


def test_a_variant_that_its_guard_stops_has_failed(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "guards", lambda *_: [Stops()])
    run, _ = pipeline.start(only(given), tmp_path / "run", lambda _: None)
    [row] = run.metrics()
    assert (row["failed"], row["held_out"]) == ("stopped after step 1", None)


def test_a_task_that_calls_nothing_right_is_judged_by_its_reward(
    given: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "text").mkdir()
    for split in ("train", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text(tiny.words(200, len(split)))
    given["run"].pop("data")
    task = {"name": "text", "options": {"path": str(tmp_path / "text"), "words": 8}}
    given["run"] |= {"task": task, "contamination": {"action": "off"}}
    said: list[Any] = []
    run, _ = pipeline.start(only(given), tmp_path / "run", said.append)
    [row] = run.metrics()
    assert row["held_out"] is None
    assert row["held_out_reward"] >= 0
    assert "held-out reward" in said[-1].text
    head = (run.path / "ablation.md").read_text().splitlines()[0]
    assert "held-out reward" in head
    assert "correct" not in head
    assert "spline" not in head
