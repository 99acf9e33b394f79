"""What can be told of the vLLM engine without vLLM: ranks, files, and what is refused."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import tiny
from loralab.adapters.state import AdapterState, Factors
from loralab.engines import vllm_start
from loralab.engines.vllm_members import (
    RANKS,
    MemberFiles,
    MemberPlaces,
    allowed_rank,
    padded,
)
from loralab.errors import UserError


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the memory-backed folder."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr("loralab.engines.memory_folder.MEMORY", folder)
    return folder


def member(rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> AdapterState:
    made = tiny.adapter(tiny.model("llama"), seed=seed, rank=rank, scaling=0.7)
    factors = {name: Factors(a.to(dtype), b.to(dtype)) for name, (a, b) in made.factors.items()}
    return AdapterState(factors, made.scaling, extra={"init_lora_weights": "pissa"})


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512)]
)
def test_a_rank_becomes_the_next_that_vllm_allows(rank: int, allowed: int) -> None:
    assert allowed_rank(rank) == allowed
    assert allowed in RANKS


def test_a_rank_over_all_of_vllms_is_refused() -> None:
    with pytest.raises(UserError, match="rank is 513"):
        allowed_rank(513)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4, 8, 11])
def test_padding_leaves_the_change_of_the_weights_as_it_is(rank: int, dtype: torch.dtype) -> None:
    state = member(rank, dtype=dtype)
    # One module of a smaller rank than the others.
    first = next(iter(state.factors))
    a, b = state.factors[first]
    state = AdapterState({**state.factors, first: Factors(a[:1], b[:, :1])}, state.scaling)
    wide = padded(state)
    assert wide.scaling == state.scaling
    for name, (a, b) in state.factors.items():
        made = wide.factors[name]
        assert made.A.shape[0] == made.B.shape[1] == allowed_rank(rank)
        assert (made.A.dtype, made.B.dtype) == (dtype, dtype)
        assert torch.equal(made.A[: a.shape[0]], a)
        assert torch.equal(made.B[:, : b.shape[1]], b)
        assert not made.A[a.shape[0] :].any()
        assert not made.B[:, b.shape[1] :].any()


def test_peft_reads_the_scaling_back_from_a_padded_file(memory: Path) -> None:
    state = member(3)
    files = MemberFiles()
    number, folder = files.write(state)
    assert number == 1
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["lora_alpha"] / config["r"] == pytest.approx(state.scaling, rel=1e-15)
    # vLLM refuses this value, which says how an adapter began and nothing of what it is.
    assert "init_lora_weights" not in config
    again = AdapterState.load(folder)
    for name, (a, b) in state.factors.items():
        assert torch.equal(again.factors[name].A[:3], a)
        assert torch.equal(again.factors[name].B[:, :3], b)


def test_files_have_new_names_and_go_away(memory: Path) -> None:
    files = MemberFiles()
    made = [files.write(member(2, seed)) for seed in (0, 1, 0)]
    assert [number for number, _ in made] == [1, 2, 3]
    assert len({folder for _, folder in made}) == 3
    assert all(memory in folder.parents for _, folder in made)
    files.remove(made[1][1])
    assert [folder.exists() for _, folder in made] == [True, False, True]
    files.close()
    assert not list(memory.iterdir())


def test_files_of_an_engine_that_is_forgotten_go_away(memory: Path) -> None:
    files = MemberFiles()
    files.write(member(2))
    del files
    assert not list(memory.iterdir())


def test_a_member_that_memory_has_no_room_for_goes_to_the_disk(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    files = MemberFiles()
    # Containers often have 64 MB of memory-backed files.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    _, folder = files.write(member(2))
    assert disk in folder.parents
    files.close()
    assert not list(disk.iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="cannot write"):
        MemberFiles().write(member(2))


class Core:
    """As much of vLLM's engine as places need."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.seen: list[tuple[str, int]] = []

    def add_lora(self, request: Any) -> None:
        assert (Path(request.lora_path) / "adapter_model.safetensors").is_file()
        self.held.append(request.lora_int_id)
        self.seen.append((request.lora_name, request.lora_int_id))

    def remove_lora(self, number: int) -> None:
        self.held.remove(number)


def test_members_share_places_and_the_busy_ones_keep_theirs(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LoRARequest(SimpleNamespace):
        def __init__(self, name: str, number: int, path: str) -> None:
            super().__init__(lora_name=name, lora_int_id=number, lora_path=path)

    monkeypatch.setitem(
        sys.modules, "vllm.lora.request", cast(Any, SimpleNamespace(LoRARequest=LoRARequest))
    )
    core = Core()
    places = MemberPlaces(core, count=2)
    states = {name: member(2, seed) for seed, name in enumerate("abc")}
    places.load(states)
    assert not core.held
    busy = Counter[str]()
    for name in ("a", "b", "a"):
        places.hold(name, busy)
    assert core.held == [1, 2]
    busy["a"] = 1
    places.hold("c", busy)
    assert core.held == [1, 3]
    assert places.lora("c").lora_int_id == 3
    places.load({"a": states["b"]})
    assert not core.held
    places.hold("a", busy)
    assert len({name for name, _ in core.seen}) == len({number for _, number in core.seen}) == 4
    places.close()
    assert not list(memory.iterdir())


def test_without_vllm_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in vllm_start._ENVIRONMENT:
        monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=r"pip install 'loralab\[vllm\]'") as caught:
        vllm_start.import_vllm()
    assert "\n" not in str(caught.value)


def test_what_vllm_changes_around_itself_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    before, drawn = torch.set_num_threads, torch.get_rng_state()
    with vllm_start.as_it_was():
        torch.set_num_threads = lambda _: None
        os.environ["LD_PRELOAD"] = "libsome.so"
        torch.manual_seed(9)
    assert torch.set_num_threads is before
    assert "LD_PRELOAD" not in os.environ
    assert torch.equal(torch.get_rng_state(), drawn)


def test_importing_the_engine_does_not_import_vllm() -> None:
    importlib.import_module("loralab.engines.vllm")
    code = "import sys, loralab.engines.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
