"""A run directory loses nothing: not to kill -9, a full disk, a torn line or a second writer."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loralab import durable
from loralab.errors import UserError
from loralab.run import Run

CONFIG = {"kind": "evolve", "seed": 3, "evolution": {"lr": 1e-5, "stop": ["a", "b"]}}


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with Run.create(path, CONFIG) as run:
        run.log_metrics({"generation": 0, "reward_mean": 0.1 + 0.2})
        run.log_completions([{"completion": "a\nb\u2028\x00\ud800é"}, {"completion": ""}])
        run.log_finding({"what": "x"})
        run.write("adapter/adapter_config.json", b"{}")
        run.note(kernel="native")
    read = Run.open(path)
    assert read.config == CONFIG
    assert yaml.safe_load((path / "config.yaml").read_text()) == CONFIG
    assert read.metrics() == [{"generation": 0, "reward_mean": 0.1 + 0.2}]
    assert [row["completion"] for row in read.completions()] == ["a\nb\u2028\x00\ud800é", ""]
    assert read.findings() == [{"what": "x"}]
    assert (read.adapter / "adapter_config.json").read_bytes() == b"{}"
    environment = read.environment()
    assert environment["kernel"] == "native"
    assert environment["python"] == sys.version.split()[0]
    assert environment["cores"] >= 1
    assert environment["torch"]
    with pytest.raises(RuntimeError, match="reading only"):
        read.log_metrics({})


def test_an_existing_directory_is_never_overwritten(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", CONFIG).close()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for name in ("run", "mine"):
        before = sorted(os.listdir(tmp_path / name))
        with pytest.raises(UserError) as error:
            Run.create(tmp_path / name, {})
        message = one_line(error)
        assert "--resume" in message
        assert "--run-dir" in message
        assert set(os.listdir(tmp_path / name)) - {".lock"} == set(before) - {".lock"}
    assert Run.open(tmp_path / "run").config == CONFIG


def test_a_create_cut_short_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / ".lock").touch()
    (path / (durable.TEMPORARY_PREFIX + "x")).write_text("half")
    (path / (durable.TEMPORARY_PREFIX + "adapter")).mkdir()
    (path / (durable.TEMPORARY_PREFIX + "adapter") / "weights").write_text("half")
    Run.create(path, CONFIG).close()
    assert not list(path.glob(durable.TEMPORARY_PREFIX + "*"))


def test_resume_names_what_changed_in_the_config(tmp_path: Path) -> None:
    Run.create(tmp_path, CONFIG | {"stop": ("x",)}).close()
    Run.resume(tmp_path, CONFIG | {"stop": ["x"]}).close()  # a tuple is a list on disk
    other = {"kind": "evolve", "seed": 4, "evolution": {"lr": 1e-5, "stop": ["a"]}, "new": 1}
    with pytest.raises(UserError) as error:
        Run.resume(tmp_path, other)
    message = one_line(error)
    for part in ("seed was 3, is 4", "evolution.stop", "new was null, is 1"):
        assert part in message
    assert "lr" not in message
    Run.resume(tmp_path, CONFIG | {"stop": ["x"]}).close()  # the refusal gave the lock back


@pytest.mark.parametrize("path", ["absent", "file/inside"])
def test_impossible_places_are_one_line(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        Run.resume(tmp_path / path)
    assert "no run at" in one_line(error)
    if path != "absent":
        with pytest.raises(UserError) as error:
            Run.create(tmp_path / path, CONFIG)
        assert "--run-dir" in one_line(error)


def test_an_unwritable_directory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere, so chmod proves nothing
    with pytest.raises(UserError) as error:
        Run.create(tmp_path / "run", CONFIG)
    assert "Permission denied; make it writable or choose another --run-dir" in one_line(error)


def test_write_stays_inside(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", CONFIG) as run, pytest.raises(ValueError, match="outside"):
        run.write("../elsewhere", "x")


@pytest.mark.parametrize(
    "torn", [b'{"generation": 2, "x', b"\x00\x00\x00", b"{}", "é".encode()[:1]]
)
def test_a_torn_last_line_is_ignored_then_cut(tmp_path: Path, torn: bytes) -> None:
    with Run.create(tmp_path, CONFIG) as run:
        run.log_metrics({"generation": 0})
        run.log_metrics({"generation": 1})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    whole = [{"generation": 0}, {"generation": 1}]
    assert Run.open(tmp_path).metrics() == whole
    with Run.resume(tmp_path, CONFIG) as run:
        run.log_metrics({"generation": 2})
        assert run.metrics() == [*whole, {"generation": 2}]


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"generation": 0}\ngarbage\n{"generation": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        durable.read_lines(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(), json_values), min_size=1, max_size=4), data=st.data()
)
def test_any_cut_leaves_a_prefix_of_the_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    for row in rows:
        durable.append_line(path, row)
    assert durable.read_lines(path) == rows
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    kept = content[:cut].count(b"\n")
    assert durable.read_lines(path) == rows[:kept]
    durable.cut_torn_line(path)
    durable.append_line(path, {"next": 1})
    assert durable.read_lines(path) == [*rows[:kept], {"next": 1}]


def test_floats_keep_every_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(200)] + [-0.0, 5e-324]
    values = [value for value in values if value == value]
    durable.append_line(tmp_path / "x", {"values": values})
    back = durable.read_lines(tmp_path / "x")[0]["values"]
    assert [struct.pack("<d", value) for value in back] == [struct.pack("<d", v) for v in values]


def test_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    import numpy as np

    durable.append_line(tmp_path / "x", {"a": np.float32(0.5), "b": np.int64(3), "c": np.ones(2)})
    assert durable.read_lines(tmp_path / "x") == [{"a": 0.5, "b": 3, "c": [1.0, 1.0]}]


def test_rewind_forgets_a_generation_to_be_run_again(tmp_path: Path) -> None:
    with Run.create(tmp_path, CONFIG) as run:
        for generation in range(4):
            run.log_metrics({"generation": generation})
            run.log_completions([{"generation": generation}] * 2)
        run.log_completions([{"generation": 1, "phase": "after"}])
        run.rewind(2)
        assert [row["generation"] for row in run.metrics()] == [0, 1]
        assert [row["generation"] for row in run.completions()] == [0, 0, 1, 1]


HOLDER = """
import sys, time
from loralab.run import Run
run = Run.create(sys.argv[1], {})
print("locked", flush=True)
time.sleep(60)
"""


def test_two_processes_never_write_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with start(HOLDER, path) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(UserError) as error:
                Run.resume(path)
            assert f"process {holder.pid}" in one_line(error)
            assert Run.open(path).metrics() == []  # reading is free
        finally:
            holder.kill()
    Run.resume(path).close()  # a killed writer holds nothing


WRITER = """
import sys
from pathlib import Path
from loralab.run import Run
path = Path(sys.argv[1])
run = Run.resume(path, {"a": 1}) if (path / "config.yaml").exists() else Run.create(path, {"a": 1})
generation = len(run.metrics())
while True:
    body = str(generation) * 50000
    run.write("state.txt", body)
    run.log_completions([{"generation": generation, "completion": "x" * 5000}] * 3)
    run.log_metrics({"generation": generation, "state": len(body)})
    print(generation, flush=True)
    generation += 1
"""


def test_kill_9_at_any_moment_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path, rng, acknowledged = tmp_path / "run", random.Random(0), -1
    for _ in range(8):
        with start(WRITER, path) as writer:
            assert writer.stdout is not None
            line = writer.stdout.readline()  # it is up; then let it run for a random moment
            time.sleep(rng.uniform(0, 0.06))
            writer.send_signal(signal.SIGKILL)
            lines = [line, *writer.stdout.read().split("\n")]
        acknowledged = max([acknowledged, *(int(text) for text in lines if text.strip())])
        generations = [row["generation"] for row in Run.open(path).metrics()]
        assert generations == list(range(len(generations)))
        assert len(generations) - 1 in (acknowledged, acknowledged + 1)
        state = (path / "state.txt").read_text()
        assert state in [str(g) * 50000 for g in range(acknowledged, acknowledged + 3)]
    assert acknowledged > 8
    with Run.resume(path, {"a": 1}):
        assert not list(path.glob(durable.TEMPORARY_PREFIX + "*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with Run.create(tmp_path / "run", CONFIG) as run:
        run.log_metrics({"generation": 0})
        run.write("adapter/weights", b"old" * 100)
        metrics, genuine = run.path / "metrics.jsonl", os.write
        before = metrics.read_bytes()

        def half_then_full(handle: int, data: memoryview) -> int:
            if len(data) < 20:
                raise OSError(code, os.strerror(code))
            return genuine(handle, data[: len(data) // 2])

        monkeypatch.setattr(os, "write", half_then_full)
        for attempt in (
            lambda: run.log_metrics({"generation": 1, "text": "x" * 500}),
            lambda: run.write("adapter/weights", b"new" * 100),
        ):
            with pytest.raises(UserError) as error:
                attempt()
            assert "free some space, then continue with --resume" in one_line(error)
        monkeypatch.undo()
        assert metrics.read_bytes() == before
        assert (run.adapter / "weights").read_bytes() == b"old" * 100
        assert [file.name for file in run.adapter.iterdir()] == ["weights"]
        run.log_metrics({"generation": 1})
        assert [row["generation"] for row in run.metrics()] == [0, 1]


def test_a_disk_that_really_fills_up(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        written = 0
        with Run.create(disk / "run", CONFIG) as run:
            with pytest.raises(UserError) as error:  # noqa: PT012
                for written in range(1000):
                    run.log_metrics({"generation": written, "text": "x" * 1500})
            assert "no space left on disk" in one_line(error)
            assert written > 10
            assert [row["generation"] for row in run.metrics()] == list(range(written))
            with pytest.raises(UserError, match="no space left"):
                run.write("large", b"x" * 200_000)
            with pytest.raises(UserError, match="no space left"):
                Run.create(disk / "other", {"text": "x" * 9000})
        shutil.rmtree(disk / "other", ignore_errors=True)
        assert (disk / "run" / "metrics.jsonl").read_bytes().endswith(b"}\n")
        lines = (disk / "run" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (disk / "run" / "metrics.jsonl").write_bytes(b"".join(lines[:5]))  # space again
        with Run.resume(disk / "run", CONFIG) as run:
            run.log_metrics({"generation": 5})
            assert len(run.metrics()) == 6
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_resuming_elsewhere_is_recorded(tmp_path: Path) -> None:
    Run.create(tmp_path, CONFIG).close()
    file = tmp_path / "environment.json"
    known = json.loads(file.read_text()) | {"cpu": "Another CPU"}
    file.write_text(json.dumps(known))
    for _ in range(2):
        Run.resume(tmp_path).close()
    environment = Run.open(tmp_path).environment()
    assert environment["cpu"] == "Another CPU"
    assert [list(change) for change in environment["resumed_on"]] == [["cpu"]]
