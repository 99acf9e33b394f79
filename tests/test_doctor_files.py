"""What the doctor says of files that are not right: one clear line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loralab
import small_language as language
import tiny
from doctor_cases import WEIGHTS, base_in, examined, rewrite_config, rewrite_tensors, saved
from loralab.errors import UserError
from loralab.health.doctor import Report


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_in(tmp_path_factory)


@pytest.fixture
def sound(base: Path, tmp_path: Path) -> Path:
    """A plain adapter, trained a little."""
    return saved(language.adapted(base), tmp_path / "adapter")


def test_a_base_that_it_was_not_made_for(sound: Path, tmp_path: Path) -> None:
    other = language.make_base(tmp_path / "other", hidden=32, steps=0)
    report = examined(sound, other)
    assert (report.verdict, report.causes[0]) == ("broken", "file.wrong_base")
    assert "is for (64, 88), the base has (32, 88)" in report.findings[0].message
    gpt2 = tmp_path / "gpt2"
    tiny.model("gpt2").save_pretrained(gpt2)
    tiny.tokenizer().save_pretrained(gpt2)
    report = examined(sound, gpt2)
    assert (report.verdict, report.causes[0]) == ("broken", "file.wrong_base")
    assert "none of its" in report.findings[0].message


def one_line(report: Report) -> str:
    assert report.verdict == "broken"
    [finding] = report.findings
    assert "\n" not in finding.message
    assert len(finding.message) < 500
    return finding.message


def test_damaged_files_get_one_line_each(sound: Path) -> None:
    whole = (sound / WEIGHTS).read_bytes()
    (sound / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert "not safetensors" in one_line(examined(sound))
    (sound / WEIGHTS).write_bytes(b"")
    assert "0 bytes" in one_line(examined(sound))
    (sound / WEIGHTS).unlink()
    assert "no such file" in one_line(examined(sound))
    (sound / WEIGHTS).write_bytes(whole)
    rewrite_config(sound, r=8)
    assert "the config says rank 8, its tensors have 4" in one_line(examined(sound))
    (sound / "adapter_config.json").write_text("{")
    assert "not JSON" in one_line(examined(sound))
    (sound / "adapter_config.json").unlink()
    assert "no adapter_config.json" in one_line(examined(sound))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "FOO"}, "peft_type is 'FOO', which this PEFT does not know"),
        ({"peft_type": ["LORA"]}, "does not know"),
        ({"r": "sixteen"}, "r is 'sixteen'; expected a whole number"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'; expected a number"),
        ({"target_modules": 7}, "target_modules is '7'; expected a pattern or a list"),
    ],
)
def test_fields_that_are_not_what_they_should_be(
    sound: Path, fields: dict[str, Any], message: str
) -> None:
    rewrite_config(sound, **fields)
    assert message in one_line(examined(sound))


def test_a_factor_without_its_other(sound: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(name for name in tensors if "lora_B" in name)]

    rewrite_tensors(sound, drop)
    report = examined(sound)
    assert (report.verdict, report.causes[0]) == ("broken", "save.keys_dropped")
    assert "lora_B" in report.findings[0].message


def test_tensors_that_load_nowhere_are_told(sound: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "layers.1.self_attn.q_proj" in name:
                other = name.replace("q_proj", "elsewhere")
                tensors[other] = tensors[name].clone()

    rewrite_tensors(sound, add)
    report = examined(sound)
    assert report.verdict == "suspect"
    [finding] = [one for one in report.findings if one.rule == "parity.keys_unexpected"]
    assert "elsewhere" in finding.message


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_refused_unread(sound: Path, name: str) -> None:
    (sound / WEIGHTS).unlink()
    (sound / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for target in (sound, sound / name):
        with pytest.raises(UserError, match="pickled weights can run code"):
            loralab.doctor(target)


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "this"},
        {"target_modules": "(a+)+b"},
        {"target_modules": ".*.*.*.*q_proj"},
        {"peft_type": "XLORA"},
    ],
)
def test_configs_that_ask_for_more_than_an_adapter_are_refused(
    sound: Path, fields: dict[str, Any]
) -> None:
    rewrite_config(sound, **fields)
    with pytest.raises(UserError):
        loralab.doctor(sound)
