"""The scripts in examples/ run as a new user would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_lslora_with_trl(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "lslora_trl.py"), "model", "made"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "largest difference of logits 0.0" in done.stdout
    assert (tmp_path / "made" / "adapter_model.safetensors").is_file()


def test_the_guard_in_a_plain_trl_script(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "guard_trl.py"), "--model", "model", "--steps", "2"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "looking took" in done.stdout
    assert len((tmp_path / "guard-trl" / "readings.jsonl").read_text().splitlines()) == 3
