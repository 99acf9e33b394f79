"""Files that changed on disk are seen by their digest, made again or set aside, and it is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_engine import FakeEngine, make_config, workbench
from loralab import durable
from loralab.adapters.state import Factors
from loralab.config import SglangConfig
from loralab.errors import UserError
from loralab.evolution.events import Event, Notice
from loralab.evolution.start import Start, start_adapter
from loralab.evolution.trainer import evolve
from loralab.evolution.workbench import Workbench
from loralab.movable import MOVABLE, NULL_SECTIONS, differences
from loralab.run import Run
from test_trainer import cut_journal

GENERATIONS = 6


def config(init: str = "zero_b") -> Any:
    """Another start than zero_b is initialised, and kept in start/."""
    made = make_config(generations=GENERATIONS, eval_every=2)
    adapter = made.adapter.model_copy(
        update={"init": made.adapter.init.model_copy(update={"name": init})}
    )
    return made.model_copy(update={"adapter": adapter})


def initialised(seed: int) -> Any:
    """What stands in for an initialisation that takes a part out of W."""

    def make(config: Any, task: Any) -> Start:
        shapes = {"layers.0.q": (12, 10), "layers.0.up": (20, 10), "layers.1.q": (12, 10)}
        drawn = start_adapter(shapes, 4, 4.0, seed, "fake")
        g = torch.Generator().manual_seed(seed)
        factors = {
            name: Factors(f.A, 0.01 * torch.randn(f.B.shape, generator=g))
            for name, f in drawn.factors.items()
        }
        adapter = replace(drawn, factors=factors)
        return Start(adapter, adapter)

    return make


def run(path: Path, init: str = "zero_b", seed: int = 5) -> tuple[Any, list[str]]:
    events: list[Event] = []
    made = config(init)
    values = made.to_dict()
    fresh = not (path / "config.yaml").exists()

    def bench(_: Any) -> Workbench:
        return replace(workbench(FakeEngine()), initialise=initialised(seed))

    with Run.create(path, values) if fresh else Run.resume(path, values) as opened:
        result = evolve(made, opened, events.append, bench)
    return result, [event.text for event in events if isinstance(event, Notice)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for init in ("zero_b", "orthogonal"):
        made[init] = tmp_path_factory.mktemp("damage") / init
        run(made[init], init)
    return made


def halved(whole: dict[str, Path], tmp_path: Path, init: str = "zero_b") -> Path:
    path = tmp_path / "run"
    shutil.copytree(whole[init], path)
    cut_journal(path, 4)
    return path


def same(path: Path, other: Path) -> bool:
    names = [f"{folder}/adapter_model.safetensors" for folder in ("adapter", "checkpoints/final")]
    return all(
        (path / n).read_bytes() == (other / n).read_bytes() for n in ["journal.jsonl", *names]
    )


def flip(file: Path, part: float = 0.9) -> None:
    data = bytearray(file.read_bytes())
    data[int(part * len(data))] ^= 0x20
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {"flipped": flip, "truncated": cut, "gone": lambda file: file.unlink()}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["adapter", "taken"])
def test_a_damaged_start_is_made_again(
    whole: dict[str, Path], tmp_path: Path, damage: str, part: str
) -> None:
    path = halved(whole, tmp_path, "orthogonal")
    DAMAGES[damage](path / "start" / part / "adapter_model.safetensors")
    result, said = run(path, "orthogonal")
    assert result.complete
    assert same(path, whole["orthogonal"])
    [line] = [line for line in said if f"{path / 'start'} was damaged" in line]
    assert "orthogonal made it again, with the digest in the journal" in line
    assert (path / "start.damaged").is_dir()
    assert any(row["rule"] == "damaged_start" for row in Run.open(path).findings())


def test_a_start_that_cannot_be_made_again_is_one_line(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    path = halved(whole, tmp_path, "orthogonal")
    flip(path / "start" / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"start is damaged \(its digest is not the journal's\)"):
        run(path, "orthogonal", seed=6)


def test_a_damaged_header_is_made_again(whole: dict[str, Path], tmp_path: Path) -> None:
    for init in ("zero_b", "orthogonal"):
        path = halved(whole, tmp_path / init, init)
        flip(path / "journal.jsonl", 0.01)
        result, said = run(path, init)
        assert result.complete
        assert same(path, whole[init])
        assert any("line 1: the checksum does not match; made again" in line for line in said)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_written_anew(
    whole: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    for cut_first, name in ((True, "adapter"), (False, "adapter"), (False, "checkpoints/final")):
        path = tmp_path / f"{name}-{cut_first}".replace("/", "-")
        shutil.copytree(whole["zero_b"], path)
        if cut_first:
            cut_journal(path, 5)
        DAMAGES[damage](path / name / "adapter_model.safetensors")
        result, said = run(path)
        assert result.complete
        assert same(path, whole["zero_b"])
        lines = [line for line in said if f"{path / name}: " in line]
        assert lines
        assert "anew from the journal" in lines[0]


def test_a_sound_run_has_nothing_to_say(whole: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole["orthogonal"], path)
    _, said = run(path, "orthogonal")
    assert not [line for line in said if str(path) in line]
    assert same(path, whole["orthogonal"])


@pytest.mark.parametrize("name", ["metrics", "completions", "readings", "findings"])
def test_a_damaged_log_keeps_no_run_from_going_on(
    whole: dict[str, Path], tmp_path: Path, name: str
) -> None:
    path = halved(whole, tmp_path)
    file = path / f"{name}.jsonl"
    if len(durable.read_lines(file)) < 2:
        durable.append_lines(file, [{"rule": "mine", "step": n} for n in range(3)])
    lines = file.read_bytes().splitlines(True)
    file.write_bytes(b"".join([lines[0], b"\x00" + lines[1], *lines[2:]]))
    result, said = run(path)
    assert result.complete
    assert same(path, whole["zero_b"])
    assert f"{file}: 1 damaged lines are left out" in said
    assert lines[1] in (path / f"{name}.damaged.jsonl").read_bytes()
    durable.read_lines(file)


def test_damaged_timings_are_counted_anew(whole: dict[str, Path], tmp_path: Path) -> None:
    path = halved(whole, tmp_path)
    cut(path / "timings.json")
    result, said = run(path)
    assert result.complete
    assert any("timings.json: damaged; time is counted anew" in line for line in said)
    assert json.loads((path / "timings.json").read_text())


def test_where_a_run_is_done_may_change_and_what_it_is_may_not(tmp_path: Path) -> None:
    old = {"cluster": {"actors": 2, "pairs_per_unit": 1}, "engine": {"sglang": {"url": "http://a"}}}
    new = {"cluster": {"actors": 3, "pairs_per_unit": 1}, "engine": {"sglang": {"url": "http://b"}}}
    assert differences(old, new) == []
    assert differences(old, {**new, "scoring": None}) == []
    assert differences(old, {**new, "cluster": {"actors": 2, "pairs_per_unit": 2}}) == [
        "cluster.pairs_per_unit was 1, is 2"
    ]
    assert differences(old, {**new, "cluster": None})
    Run.create(tmp_path, old).close()
    Run.resume(tmp_path, new).close()
    assert Run.open(tmp_path).config == new


def test_a_disk_that_is_full_is_one_line_for_a_library_in_rust_too(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left (os error 28)")

    with pytest.raises(UserError, match="no space left on disk while writing"):
        durable.publish(tmp_path / "adapter", write)
    with pytest.raises(ZeroDivisionError):
        durable.publish(tmp_path / "adapter", lambda folder: 1 / 0)  # type: ignore[arg-type,return-value]


def test_a_server_may_move_from_a_run_of_its_own_to_a_url_and_back() -> None:
    def config(**section: Any) -> dict[str, Any]:
        given = SglangConfig(**section).model_dump(mode="json") if section else None
        return {"engine": {"name": "sglang", "sglang": given}}

    there = config(url="http://a", batch=3)
    assert differences(config(), there) == []
    assert differences(there, config()) == []
    assert differences({"engine": {"name": "sglang"}}, there) == []
    assert differences(config(), config(url="http://a", max_loras=4)) == [
        "engine.sglang.max_loras was 8, is 4"
    ]
    plain = {"engine": {"name": "batched", "sglang": None}}
    assert differences(plain, there) == ['engine.name was "batched", is "sglang"']


def test_the_defaults_of_a_section_that_is_left_out_are_the_configs() -> None:
    section = SglangConfig().model_dump(mode="json")
    fixed = {key: value for key, value in section.items() if f"engine.sglang.{key}" not in MOVABLE}
    assert NULL_SECTIONS["engine.sglang"] == fixed
