"""A checkpoint that changed on disk is seen by its digests, and the one before it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from loralab import durable
from loralab.gradient.outputs import resumed
from loralab.run import Run


def checkpoint(run: Run, step: int) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "inner" / "optimizer.pt").write_bytes(b"moments" * 100)
    durable.seal(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "adapter_model.safetensors", "inner/optimizer.pt", durable.SEAL],
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_the_last_good_checkpoint_is_used(tmp_path: Path, name: str, damage: str) -> None:
    with Run.create(tmp_path / "run", {"kind": "sft"}) as run:
        first, second = checkpoint(run, 5), checkpoint(run, 10)
        for step in range(1, 13):
            run.log_metrics({"step": step})
        assert resumed(run) == (second, 10)
        assert run.findings() == []
        file = second / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.unlink()
        if damage != "gone":
            file.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
        if (name, damage) == (durable.SEAL, "gone"):  # as one of an older version
            assert resumed(run) == (second, 10)
            return
        assert resumed(run) == (first, 5)
        assert [row["step"] for row in run.metrics()] == list(range(1, 6))
        if (name, damage) != ("trainer_state.json", "gone"):  # that one is no whole checkpoint
            [finding] = run.findings()
            assert "the run goes on at step 5" in finding["what"]
            assert (run.checkpoints / "damaged-checkpoint-10").is_dir()
        (first / "trainer_state.json").write_text("{}")
        assert resumed(run) == (None, 0)


def test_a_folder_without_a_seal_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert durable.broken(tmp_path) is None
    durable.seal(tmp_path)
    (tmp_path / "more").write_text("y")
    assert durable.broken(tmp_path) is None
    (tmp_path / "file").write_text("z")
    assert durable.broken(tmp_path) == "the digest of file is another"
