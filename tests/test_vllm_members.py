"""What can be told of the vLLM engine without vLLM: ranks, files, and what is refused."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from loralab.adapters.state import AdapterState, Factors
from loralab.engines import vllm_start
from loralab.engines.vllm_members import (
    RANKS,
    Finite,
    MemberFiles,
    allowed_rank,
    check_shapes,
    padded,
)
from loralab.errors import UserError


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


def test_peft_reads_the_scaling_back_from_a_padded_file(tmp_path: Path) -> None:
    state = member(3)
    files = MemberFiles(tmp_path)
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


def test_files_have_new_names_and_go_away(tmp_path: Path) -> None:
    files = MemberFiles(tmp_path)
    made = [files.write(member(2, seed)) for seed in (0, 1, 0)]
    assert [number for number, _ in made] == [1, 2, 3]
    assert len({folder for _, folder in made}) == 3
    assert all(folder.parent == tmp_path for _, folder in made)
    files.remove(made[1][1])
    assert sorted(tmp_path.iterdir()) == sorted([made[0][1], made[2][1]])
    files.close()
    assert not list(tmp_path.iterdir())


def test_files_of_an_engine_that_is_forgotten_go_away(tmp_path: Path) -> None:
    files = MemberFiles(tmp_path)
    files.write(member(2))
    del files
    assert not list(tmp_path.iterdir())


def test_a_member_that_memory_has_no_room_for_goes_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    # A folder that is not there has no room; most containers have one of 64 MB.
    _, folder = MemberFiles(tmp_path / "missing").write(member(2))
    assert folder.parent == disk
    monkeypatch.setattr("loralab.engines.vllm_members._room", lambda _: 1000)
    _, folder = MemberFiles(tmp_path).write(member(2))
    assert folder.parent == disk
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="cannot write a member"):
        MemberFiles(tmp_path / "missing").write(member(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["A", "B"])
def test_what_is_not_finite_is_named(part: str, value: float) -> None:
    state = member(4)
    assert Finite(torch.bfloat16).complaint(state) is None
    name = list(state.factors)[2]
    broken = Factors(*(t.clone() for t in state.factors[name]))
    getattr(broken, part)[1, 0] = value
    why = Finite(torch.bfloat16).complaint(
        AdapterState({**state.factors, name: broken}, state.scaling)
    )
    assert why is not None
    assert f"{part} of {name}" in why
    assert "NaN" in why


def test_a_number_that_the_engines_dtype_cannot_hold_is_not_finite() -> None:
    state = member(4)
    name = next(iter(state.factors))
    state.factors[name].B[0, 0] = 1e6
    assert Finite(torch.float32).complaint(state) is None
    assert f"B of {name}" in str(Finite(torch.float16).complaint(state))


def test_what_vllm_would_pass_over_in_silence_is_refused() -> None:
    state = member(4)
    shapes = {name: (f.B.shape[0], f.A.shape[1]) for name, f in state.factors.items()}
    check_shapes("m", state, shapes, 8)
    name = next(iter(shapes))
    with pytest.raises(UserError, match=rf"adapter 'm': '{name}' is no linear module"):
        check_shapes("m", state, {k: v for k, v in shapes.items() if k != name}, 8)
    with pytest.raises(UserError, match=f"adapter 'm': {name} is .* the model's is 3 x 5"):
        check_shapes("m", state, {**shapes, name: (3, 5)}, 8)
    with pytest.raises(UserError, match=r"adapter 'm' has rank 4.*up to 1"):
        check_shapes("m", state, shapes, 1)
    with pytest.raises(UserError, match="adapter 'm' has no factors"):
        check_shapes("m", AdapterState({}, 1.0), shapes, 8)


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
