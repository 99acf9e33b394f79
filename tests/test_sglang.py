"""The SGLang engine against a local server that keeps to the fields of the real one's source."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from loralab.adapters.state import AdapterState, Factors
from loralab.config import SglangConfig
from loralab.engines import sglang_link
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.engines.served import ServedModel
from loralab.engines.sglang import SglangEngine
from loralab.engines.sglang_link import Link
from loralab.errors import UserError
from loralab.evolution.opening_sglang import connected
from model_server import serving
from serving_contract import (
    ServingContract,
    Subject,
    ending_request,
    texts,
    tiny_adapters,
    tiny_prompts,
)
from sglang_server import FakeSglang

CONTEXT = 96 - 2  # what SGLang leaves free


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_link, "_WAIT", 0.01)
    monkeypatch.setattr(sglang_link, "_LOOK", 0.05)


def connect(server: FakeSglang, **options: Any) -> SglangEngine:
    """An engine over a running server, with the model that it runs."""
    settings = SglangConfig(url=server.url, **{"start_timeout": 60.0, **options})
    served = ServedModel.of("tiny", server.model, tiny.tokenizer())
    return SglangEngine(served, Link(server.url, "llama", "float32", settings, ({}, {})), settings)


@contextmanager
def running(**options: Any) -> Iterator[FakeSglang]:
    """A server that was asked nothing that SGLang would not take."""
    with serving(FakeSglang(tiny.model("llama"), tiny.tokenizer(), **options)) as server:
        assert isinstance(server, FakeSglang)
        yield server
        assert server.violations == []


class TestContract(ServingContract):
    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls) -> Iterator[Subject]:
        # Fewer places than members, and batches that cut through them.
        with running(max_loras=3) as server:
            local = BatchedEngine(server.model, tiny.tokenizer(), backend="torch", threads=1)
            engine = connect(server, batch=13, workers=3)
            ends = frozenset({tiny.EOS})
            yield Subject(
                engine,
                tiny_adapters(server.model),
                tiny_prompts(),
                ending_request(local, ends),
                ends,
                CONTEXT,
                begins="<bos>",
                reference=local,
            )
            engine.close()


@pytest.fixture
def server() -> Iterator[FakeSglang]:
    with running() as made:
        yield made


def asked(adapters: dict[str, AdapterState]) -> list[Request]:
    return [
        Request(prompt, name, Sampling(8))
        for name in (None, *adapters)
        for prompt in tiny_prompts()
    ]


def expected(server: FakeSglang, adapters: dict[str, AdapterState]) -> list[str]:
    local = BatchedEngine(server.model, tiny.tokenizer(), backend="torch", threads=1)
    local.load(adapters)
    return texts(local.generate(asked(adapters)))


def test_nothing_stays_on_the_server_or_on_disk(server: FakeSglang) -> None:
    adapters = tiny_adapters(server.model)
    engine = connect(server)
    folder = engine._folder.path
    engine.load(adapters)
    first = set(server.adapters)
    assert len(list(folder.glob("loralab-*"))) == len(adapters)
    engine.load(adapters)
    assert len(server.adapters) == len(adapters)
    assert not first & set(server.adapters), "a name was used twice"
    engine.load({})
    assert server.adapters == {}
    assert list(folder.glob("loralab-*")) == []
    engine.load(adapters)
    engine.close()
    assert server.adapters == {}
    assert not folder.exists()


def test_what_a_busy_server_or_a_broken_connection_loses_is_asked_again(
    server: FakeSglang,
) -> None:
    adapters = tiny_adapters(server.model)
    engine = connect(server, batch=4, workers=2)
    # Of the broken loads the second was done: its answer alone was lost.
    server.faults.add("/load_lora_adapter", "drop", "cut", "busy")
    server.faults.add("/generate", "busy", "drop", "cut", "garbage", "busy")
    server.faults.add("/unload_lora_adapter", "cut", "busy")
    engine.load(adapters)
    assert texts(engine.generate(asked(adapters))) == expected(server, adapters)
    engine.load({})
    assert server.adapters == {}
    assert len(server.faults.met) == 10
    engine.close()


def test_one_refused_adapter_fails_alone_and_all_of_them_end_the_run(server: FakeSglang) -> None:
    adapters = tiny_adapters(server.model)
    engine = connect(server)
    server.refuse = {2}
    engine.load(adapters)
    found = engine.generate(asked(adapters))
    plain = expected(server, adapters)
    for request, done, text in zip(asked(adapters), found, plain, strict=True):
        if request.adapter == "m1":
            assert "adapter 'm1': the server does not load it" in str(done.error)
            assert "out of LoRA memory" in str(done.error)
        else:
            assert (done.text, done.error) == (text, None)
    server.refuse = set(range(100))
    with pytest.raises(UserError, match="out of LoRA memory"):
        engine.load(adapters)
    server.refuse = set()
    engine.load(adapters)
    assert texts(engine.generate(asked(adapters))) == plain
    engine.close()


def test_a_server_that_was_started_anew_gets_its_adapters_again(server: FakeSglang) -> None:
    adapters = tiny_adapters(server.model)
    engine = connect(server, batch=2, workers=2)
    engine.load(adapters)
    calls = []

    def restart(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 4:
            server.adapters.clear()  # as a new process begins

    assert texts(engine.generate(asked(adapters), restart)) == expected(server, adapters)
    assert calls == sorted(calls)
    assert calls[-1] == len(asked(adapters))
    assert len(server.adapters) == len(adapters)
    engine.close()


def test_another_server_in_its_place_ends_the_run(server: FakeSglang) -> None:
    engine = connect(server)
    engine.load(tiny_adapters(server.model))
    server.adapters.clear()
    server.name = "other"
    with pytest.raises(UserError, match=r"came back as 'sglang 0\.5\.23 other.*--resume"):
        engine.generate(asked(tiny_adapters(server.model)))
    engine.close()


def test_a_server_that_is_gone_is_waited_for_and_then_given_up() -> None:
    with running() as server:
        adapters = tiny_adapters(server.model)
        engine = connect(server, start_timeout=0.3, retries=1)
        engine.load(adapters)
    with pytest.raises(UserError, match=r"did not come back in 0\.3 s.*--resume"):
        engine.generate(asked(adapters))
    port = server.server_port
    with running(port=port) as again:
        assert texts(engine.generate(asked(adapters))) == expected(again, adapters)
        engine.close()


def test_requests_at_one_time_are_bounded(server: FakeSglang) -> None:
    engine = connect(server, batch=1, workers=2)
    server.faults.add("/generate", *[0.05] * 8)
    engine.generate(asked({}) * 2)
    assert server.most == 2
    engine.close()


def test_a_rank_or_module_that_does_not_fit_is_refused_before_anything_changes(
    server: FakeSglang,
) -> None:
    adapters = tiny_adapters(server.model)
    engine = connect(server)
    engine.load(adapters)
    held = set(server.adapters)
    big = tiny.adapter(server.model, seed=1, rank=17)
    with pytest.raises(UserError, match=r"rank 17.*up to 16"):
        engine.load({"big": big})
    first = next(iter(big.factors))
    with pytest.raises(UserError, match="no linear module"):
        engine.load({"odd": AdapterState({"model.nothing": big.factors[first]}, 1.0)})
    wrong = {first: Factors(torch.ones(2, 5), big.factors[first].B[:, :2])}
    with pytest.raises(UserError, match=r"is 64 x 5; that of tiny is 64 x 64"):
        engine.load({"odd": AdapterState(wrong, 1.0)})
    assert set(server.adapters) == held
    with pytest.raises(UserError, match=r"cannot move base weights.*engine\.name: batched"):
        engine.set_base({first: torch.ones(64, 64)})
    engine.set_base({})
    engine.close()


def test_folders_of_killed_drivers_are_swept(server: FakeSglang, tmp_path: Path) -> None:
    engine = connect(server, folder=str(tmp_path))
    kept = engine._folder.path
    child = os.fork()
    if child == 0:
        from loralab.engines.memory_folder import MemoryFolder

        held = MemoryFolder(str(tmp_path))
        os._exit(9 if held.path.exists() else 1)  # no finalizer runs
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert len(list(tmp_path.iterdir())) == 2
    other = connect(server, folder=str(tmp_path))
    assert set(tmp_path.iterdir()) == {kept, other._folder.path}
    engine.close()
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_the_kernel_names_version_and_model(server: FakeSglang) -> None:
    engine = connect(server)
    assert engine.kernel == "sglang 0.5.23 tiny float32 deterministic"
    engine.close()


def test_a_server_of_another_model_or_kind_is_refused(server: FakeSglang) -> None:
    settings = SglangConfig(url=server.url)
    with pytest.raises(UserError, match=r"a llama; the config's model is a qwen2"):
        Link(server.url, "qwen2", "float32", settings, ({}, {}))
    with pytest.raises(UserError, match="cannot be reached"):
        Link("http://127.0.0.1:9", "llama", "float32", settings, ({}, {}))


def test_cancelling_does_not_wait_for_the_server(server: FakeSglang) -> None:
    engine = connect(server, batch=1, workers=4)
    server.faults.add("/generate", *[60.0] * 3)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(asked({}) * 4, interrupt)
    assert time.perf_counter() - began < 30
    assert texts(engine.generate(asked({}))) == expected(server, {})
    engine.close()


def test_keys_go_to_the_routes_that_they_open(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(key="plain", admin_key="admin") as server:
        served = ServedModel.of("tiny", server.model, tiny.tokenizer())
        adapters = tiny_adapters(server.model)

        def engine(**variables: str) -> SglangEngine:
            settings = SglangConfig(url=server.url + "/", **variables)
            return SglangEngine(served, connected(served, settings), settings)

        monkeypatch.setenv("PLAIN", "plain")
        monkeypatch.setenv("ADMIN", "admin")
        both = engine(key_variable="PLAIN", admin_key_variable="ADMIN")
        both.load(adapters)
        assert texts(both.generate(asked(adapters))) == expected(server, adapters)
        both.close()
        assert server.adapters == {}
        with pytest.raises(UserError, match=r"load_lora_adapter: HTTP 401.*Unauthorized"):
            engine(key_variable="PLAIN").load(adapters)
        with pytest.raises(UserError, match="HTTP 401"):
            engine()
        monkeypatch.setenv("PLAIN", "")
        with pytest.raises(UserError, match="variable PLAIN is empty"):
            engine(key_variable="PLAIN")
