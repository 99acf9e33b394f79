"""A folder of files that appears whole, and can be read by others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loralab import durable
from loralab.errors import UserError


def test_a_folder_is_filled_file_by_file(tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    place.mkdir()
    (place / "old.json").write_text("kept")
    (place / "weights").write_text("old")

    def write(draft: Path) -> None:
        assert (place / "weights").read_text() == "old"
        (draft / "weights").write_text("new")
        save_file({"x": torch.randn(3)}, draft / "model.safetensors")

    assert durable.publish(place, write) == place
    assert sorted(p.name for p in place.iterdir()) == ["model.safetensors", "old.json", "weights"]
    assert (place / "weights").read_text() == "new"
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert {p.stat().st_mode & 0o777 for p in place.iterdir()} == {plain.stat().st_mode & 0o777}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def write_text(folder: Path, text: str) -> None:
    (folder / "weights").write_text(text)


def test_what_fails_half_way_leaves_the_files_before(tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    durable.publish(place, lambda draft: write_text(draft, "old"))

    def fail(draft: Path) -> None:
        (draft / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="no space left"):
        durable.publish(place, fail)
    assert (place / "weights").read_text() == "old"
    durable.publish(place, lambda draft: write_text(draft, "new"))
    assert (place / "weights").read_text() == "new"
