"""`loralab doctor`: exit codes, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import small_language as language
from doctor_cases import base_in, examined, keys_dropped, rewrite_config, saved
from loralab.cli import main
from loralab.health.doctor import Report
from loralab.health.findings import Example, Finding


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_in(tmp_path_factory)


@pytest.fixture
def sound(base: Path, tmp_path: Path) -> Path:
    """A plain adapter, trained a little."""
    return saved(language.adapted(base), tmp_path / "adapter")


def test_the_command(
    base: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["doctor", "--dtype", "float32", "--prompts", "2"]
    code = main([*ask, str(keys_dropped(base, tmp_path / "b")), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (code, told["verdict"]) == (1, "broken")
    assert told["causes"][0]["mend"]
    assert told["readings"][0]["values"]["weights.modules"] == 14.0
    code = main([*ask, str(sound)])
    out = capsys.readouterr().out
    assert f"{sound}: " in out
    assert code in (0, 1)
    for target, word in (
        (str(tmp_path), "neither an adapter"),
        (str(tmp_path / "nothing"), "no such file"),
        (str(tmp_path / "no.yaml"), "no.yaml"),
    ):
        assert main([*ask, target]) == 2
        error = capsys.readouterr().err
        assert word in error
        assert error.count("\n") == 1
    rewrite_config(sound, base_model_name_or_path=None)
    assert main([*ask, str(sound)]) == 2
    assert "--base" in capsys.readouterr().err


def test_no_option_is_dropped_in_silence(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(sound), "adapter.rank=16"]) == 2
    assert "adapter.rank=16: no use for" in capsys.readouterr().err
    assert main(["doctor", "sft-gsm8k", "--base", "smollm2"]) == 2
    assert "--base: no use for config sft-gsm8k" in capsys.readouterr().err
    assert main(["doctor", "sft-gsm8k", "--data", "rows.jsonl"]) == 2
    assert "--data" in capsys.readouterr().err


def test_intruders_are_shown_as_advice(sound: Path, base: Path, tmp_path: Path) -> None:
    report = examined(sound)
    assert not any("intruder" in note for note in report.notes)
    model = language.adapted(base, r=1, steps=0)
    loud = model.base_model.model.get_submodule("model.layers.0.mlp.gate_proj")
    with torch.no_grad():
        loud.lora_B["default"].weight.normal_(std=10)
    loud = examined(saved(model, tmp_path / "loud"))
    [note] = [note for note in loud.notes if "intruder" in note]
    assert note.startswith("advice: 1 intruder dimension")
    assert note in str(loud).replace("  note: ", "")
    assert "weights.intruders" not in [one.rule for one in loud.findings]


def test_what_a_model_writes_cannot_steer_a_terminal() -> None:
    example = Example("a\nb", "\x1b[2J\x07gone", "\u202ereversed")
    finding = Finding("text.newlines", "fail", 0, "m", {}, "data.newlines", (), "do", (example,))
    shown = str(Report("x", "LORA", None, (finding,)))
    assert "a\\nb" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
