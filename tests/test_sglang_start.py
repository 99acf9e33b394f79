"""A server that a run starts and ends, and a whole search on one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

import tiny
from loralab import config as configs
from loralab.config import EvolveConfig
from loralab.engines import leash, own_server
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.engines.own_server import OwnServer
from loralab.errors import UserError
from loralab.evolution.opening_engines import open_workbench
from loralab.evolution.trainer import evolve
from loralab.models.load import load
from loralab.run import Run
from model_server import Answer, serving
from serving_contract import texts, tiny_adapters, tiny_prompts
from sglang_server import FakeSglang
from watched_processes import PATIENCE, runs, until

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.model("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def config_for(model: Path, engine: dict[str, Any]) -> EvolveConfig:
    values = {
        "kind": "evolve",
        "name": "tiny",
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "guard": None,
        "task": {"name": "conciseness"},
        "adapter": {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "down_proj"]},
        "evolution": {"generations": 3, "population": 6, "eval_every": 2, "test_samples": 2},
        "generation": {"max_new_tokens": 12},
        "engine": engine,
    }
    return configs.parse_evolve(values, "test")


def searched(path: Path, config: EvolveConfig) -> tuple[str, Any]:
    with Run.create(path, config.to_dict()) as run:
        result = evolve(config, run, open_workbench=open_workbench)
    return result.digest, result.final


def test_a_search_on_a_server_ends_in_the_bits_of_one_in_process(
    saved: Path, tmp_path: Path
) -> None:
    model, tokenizer = load(str(saved), "float32")
    with serving(FakeSglang(model, tokenizer, max_loras=4)) as server:
        assert isinstance(server, FakeSglang)
        server.faults.add("/generate", "busy", "drop", "cut")
        there = searched(
            tmp_path / "there",
            config_for(saved, {"name": "sglang", "sglang": {"url": server.url, "batch": 5}}),
        )
        assert server.violations == []
        assert server.adapters == {}
    here = searched(tmp_path / "here", config_for(saved, {"backend": "torch"}))
    assert there == here


def test_a_search_whose_server_stays_busy_stops_and_goes_on_with_nothing_lost(
    saved: Path, tmp_path: Path
) -> None:
    model, tokenizer = load(str(saved), "float32")
    with serving(FakeSglang(model, tokenizer, max_loras=4)) as server:
        section = {"url": server.url, "batch": 5, "retries": 0}
        config = config_for(saved, {"name": "sglang", "sglang": section})
        sound, path = server.routes["POST /generate"], tmp_path / "there"
        journal = path / "journal.jsonl"

        def tired(body: Any, headers: Any) -> Any:
            # With the second generation under way.
            if journal.exists() and len(journal.read_text().splitlines()) > 1:
                raise Answer(503, {"error": "queue full"})
            return sound(body, headers)

        server.routes = {**server.routes, "POST /generate": tired}
        with pytest.raises(UserError, match=r"HTTP 503.*--resume"):
            searched(path, config)
        written = journal.read_bytes()
        assert len(written.splitlines()) > 1
        server.routes = {**server.routes, "POST /generate": sound}
        with Run.resume(path, config.to_dict()) as run:
            result = evolve(config, run, open_workbench=open_workbench)
        assert journal.read_bytes().startswith(written)
    here = searched(tmp_path / "here", config_for(saved, {"backend": "torch"}))
    assert (result.digest, result.final) == here


def test_our_own_server_starts_anew_and_ends_with_its_log() -> None:
    page = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port={}, bind='127.0.0.1')"

    def ready(url: str) -> bool:
        try:
            urlopen(url, timeout=PATIENCE).close()
        except OSError:
            return False
        return True

    own = OwnServer(lambda port: [sys.executable, "-c", page.format(port)], ready, timeout=PATIENCE)
    assert ready(own.url)
    assert own._process is not None
    [child] = children(own._process.pid)
    os.kill(child, signal.SIGKILL)
    until(lambda: not runs(child))
    own.start()
    assert ready(own.url)
    [again] = children(own._process.pid)
    assert again != child
    own.close()
    assert not runs(again)
    assert not own.log.exists()


@pytest.mark.slow  # the server imports torch, twice
def test_a_server_of_our_own_is_kept_to_us_started_anew_and_ended(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["python", str(HERE / "sglang_server.py")]
    engine = {"name": "sglang", "sglang": {"command": command, "batch": 2, "workers": 2}}
    bench = open_workbench(config_for(saved, engine))
    served: Any = bench.engine
    own = served._link._own
    assert served.kernel == f"sglang 0.5.23 {saved} float32 deterministic"
    assert list(bench.weights) == [
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    model = tiny.model("llama")
    adapters = {
        name: tiny.adapter(model, seed=index, names=list(bench.weights))
        for index, name in enumerate(tiny_adapters(model))
    }
    requests = [
        Request(prompt, name, Sampling(8))
        for name in (None, *adapters)
        for prompt in tiny_prompts()
    ]
    local = BatchedEngine(model, tiny.tokenizer(), backend="torch", threads=1)
    local.load(adapters)
    expected = texts(local.generate(requests))
    served.load(adapters)
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done and not killed:
            [child] = children(own._process.pid)
            killed.append(child)
            os.kill(child, signal.SIGKILL)

    assert texts(served.generate(requests, kill)) == expected
    assert killed
    [child] = children(own._process.pid)
    assert child != killed[0]
    # Without the key nobody asks it anything.
    monkeypatch.setattr(served._link.client, "_headers", {})
    with pytest.raises(UserError, match="HTTP 401"):
        served.generate(requests[:1])
    folder, files = served._folder.path, (own.log, own._private.path)
    assert all(file.exists() for file in files)
    bench.close()
    assert not runs(child)
    assert not folder.exists()
    assert not any(file.exists() for file in files)


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_what_a_killed_starter_left_ends_with_all_it_started(tmp_path: Path) -> None:
    told = tmp_path / "pids"
    # A server that hears no request to end, with a worker of its own.
    server = f"trap '' TERM; sleep 600 & echo $$ $! > {told}; wait; sleep 600"
    starter = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {leash.__file__!r}, 'sh', '-c', {server!r}],"
        " stdin=subprocess.PIPE)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", starter])
    until(lambda: told.exists() and len(told.read_text().split()) == 2)
    pids = [int(pid) for pid in told.read_text().split()]
    assert all(map(runs, pids))
    process.kill()
    process.wait()
    until(lambda: not any(map(runs, pids)))


def test_without_sglang_the_way_to_it_is_told(saved: Path) -> None:
    with pytest.raises(UserError, match=r"pip install sglang, or name the Python"):
        open_workbench(config_for(saved, {"name": "sglang"}))
    keyed = {"name": "sglang", "sglang": {"key_variable": "A_KEY"}}
    with pytest.raises(UserError, match="gets a key of its own"):
        open_workbench(config_for(saved, keyed))


def test_a_server_that_does_not_start_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the logs of what failed stay
    monkeypatch.setattr(own_server, "_LOOK", 0.05)
    words = ["sh", "-c", "echo first; echo no GPU here; exit 3"]
    with pytest.raises(UserError, match=r"ended before it was ready \(log: .*no GPU here"):
        OwnServer(lambda port: words, lambda url: False, timeout=PATIENCE)
    with pytest.raises(UserError, match="nothing-of-this-name: No such file"):
        OwnServer(lambda port: ["nothing-of-this-name"], lambda url: False, timeout=PATIENCE)
    with pytest.raises(UserError, match=r"not ready after 0\.5 s"):
        OwnServer(lambda port: ["sleep", "600"], lambda url: False, timeout=0.5)
