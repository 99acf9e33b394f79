"""Whose fault it is: what an SGLang server cannot do stops the call, and fails no request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from loralab.config import SglangConfig
from loralab.engines import sglang_link
from loralab.engines.base import Request, Sampling
from loralab.engines.sglang_link import Link, healthy, locked
from loralab.errors import UserError
from model_server import Answer, ModelServer, serving
from serving_contract import texts, tiny_adapters, tiny_prompts
from sglang_server import FakeSglang
from test_sglang import asked, connect, expected, running


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_link, "_WAIT", 0.01)
    monkeypatch.setattr(sglang_link, "_LOOK", 0.05)


@pytest.fixture
def server() -> Iterator[FakeSglang]:
    with running() as made:
        yield made


def link(server: FakeSglang, **options: Any) -> Link:
    settings = SglangConfig(url=server.url, **options)
    return Link(server.url, "llama", "float32", settings, ({}, {}))


def test_a_server_that_stays_busy_stops_the_call_and_fails_no_request(server: FakeSglang) -> None:
    adapters = tiny_adapters(server.model)
    engine = connect(server, batch=4, workers=2, retries=1)
    engine.load(adapters)
    server.faults.add("/generate", *["busy"] * 100)
    with pytest.raises(UserError, match=r"HTTP 503.*--resume"):
        engine.generate(asked(adapters))
    server.faults.coming.clear()
    assert texts(engine.generate(asked(adapters))) == expected(server, adapters)
    server.faults.add("/load_lora_adapter", *["busy"] * 100)
    with pytest.raises(UserError, match=r"HTTP 503.*--resume"):
        engine.load(adapters)
    engine.close()


def test_a_busy_spell_longer_than_a_requests_retries_loses_nothing(server: FakeSglang) -> None:
    adapters = tiny_adapters(server.model)
    engine = connect(server, batch=64, workers=1, retries=2)
    server.faults.add("/load_lora_adapter", *["busy"] * 5)
    engine.load(adapters)
    server.faults.add("/generate", *["busy"] * 5)
    assert texts(engine.generate(asked(adapters))) == expected(server, adapters)
    engine.close()


def test_silence_is_the_servers(server: FakeSglang) -> None:
    engine = connect(server, batch=1, workers=1, timeout=1.0, retries=0)
    server.faults.add("/generate", 4.0)
    with pytest.raises(UserError, match=r"no answer in 1 s.*--resume"):
        engine.generate(asked({})[:2])
    again = connect(server, batch=1, workers=1, timeout=1.0, retries=1)
    server.faults.add("/generate", 4.0)
    assert texts(again.generate(asked({}))) == expected(server, {})
    engine.close()
    again.close()


def test_a_busy_list_of_models_is_asked_for_again(server: FakeSglang) -> None:
    adapters = tiny_adapters(server.model)
    engine = connect(server)
    server.faults.add("/load_lora_adapter", "cut")
    server.faults.add("/v1/models", "busy", "cut")
    engine.load(adapters)
    assert texts(engine.generate(asked(adapters))) == expected(server, adapters)
    server.faults.add("/load_lora_adapter", "cut")
    server.faults.add("/v1/models", *["busy"] * 8)
    engine.load(adapters)
    server.adapters.clear()
    server.faults.add("/v1/models", *["drop"] * 6)
    assert texts(engine.generate(asked(adapters))) == expected(server, adapters)
    server.faults.add("/load_lora_adapter", "cut")
    server.faults.add("/v1/models", *["busy"] * 100)
    with pytest.raises(UserError, match="v1/models: HTTP 503"):
        engine.load(adapters)
    engine.close()


def test_a_request_that_a_dropped_connection_left_under_way_gets_a_new_name(
    server: FakeSglang,
) -> None:
    engine = connect(server, batch=1, workers=1)
    server.faults.add("/generate", "drop")
    assert texts(engine.generate(asked({}))) == expected(server, {})
    assert len(server.bodies("/generate")) == len(asked({})) + 1
    engine.close()


@pytest.mark.parametrize("trouble", ["silent", "refuses", "odd"])
def test_closing_waits_little_for_a_server_and_removes_the_files(
    server: FakeSglang, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(sglang_link, "_PARTING", 0.5)
    engine = connect(server)
    engine.load(tiny_adapters(server.model))
    folder = engine._folder.path

    def unload(*_: Any) -> Any:
        match trouble:
            case "silent":
                time.sleep(5)
                return None
            case "refuses":
                raise Answer(401, {"error": "Unauthorized"})
            case _:
                return None

    server.routes = {**server.routes, "POST /unload_lora_adapter": unload}
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 5
    assert len(server.bodies("/unload_lora_adapter")) <= 5
    assert not folder.exists()


def test_a_server_of_our_own_is_ended_without_a_word_to_it(server: FakeSglang) -> None:
    class Own:
        closed = False

        def close(self) -> None:
            self.closed = True

    engine = connect(server)
    engine.load(tiny_adapters(server.model))
    own = Own()
    engine._link._own = own  # type: ignore[assignment]
    engine.close()
    assert own.closed
    assert server.bodies("/unload_lora_adapter") == []


def test_a_page_not_found_is_no_health() -> None:
    with serving(ModelServer({})) as other:
        assert not healthy(other.url)
        assert not locked(other.url)


def test_a_server_without_our_key_is_told_from_ours(server: FakeSglang) -> None:
    assert healthy(server.url)
    assert not locked(server.url)
    with running(key="k") as ours:
        assert healthy(ours.url)
        assert locked(ours.url)


def test_a_server_of_other_weights_is_refused(server: FakeSglang) -> None:
    server.quantization = "fp8"
    with pytest.raises(UserError, match=r"quantizes its weights \(fp8\)"):
        link(server)
    server.quantization = None
    settings = SglangConfig(url=server.url)
    with pytest.raises(UserError, match=r"computes in float32.*--dtype bfloat16"):
        Link(server.url, "llama", "bfloat16", settings, ({}, {}))


def told(server: FakeSglang, **other: Any) -> FakeSglang:
    """The server, which says something else of itself."""
    plain = server._server_info
    server.routes["GET /server_info"] = lambda *_: {**plain(None), **other}  # type: ignore[index]
    return server


@pytest.mark.parametrize("word", ["float32", "float", "auto"])
def test_a_dtype_goes_by_its_other_names_too(server: FakeSglang, word: str) -> None:
    assert f" {word} " in link(told(server, dtype=word)).kernel


def test_what_a_server_lacks_is_said_before_the_search(server: FakeSglang) -> None:
    with pytest.raises(UserError, match="--enable-lora"):
        link(told(server, enable_lora=False))
    with pytest.raises(UserError, match=r"runs 2 replicas.*--dp-size 1"):
        link(told(server, dp_size=2))


def test_the_kernel_names_what_changes_bits(server: FakeSglang) -> None:
    said = {"tp_size": 2, "attention_backend": "fa3", "kv_cache_dtype": "fp8_e5m2"}
    kernel = link(told(server, **said)).kernel
    assert kernel == (
        "sglang 0.5.23 tiny float32 attention_backend=fa3 kv_cache_dtype=fp8_e5m2 tp_size=2 "
        "deterministic"
    )


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("model_info", []),
        ("model_info", {}),
        ("server_info", None),
        ("server_info", {"enable_lora": True, "dtype": "float32"}),
        ("v1/models", {"data": [{"id": "tiny", "parent": "another"}]}),
        ("v1/models", {"data": [3]}),
    ],
)
def test_a_server_that_answers_otherwise_is_refused_in_a_line(
    server: FakeSglang, path: str, answer: Any
) -> None:
    server.routes = {**server.routes, f"GET /{path}": lambda *_: answer}
    with pytest.raises(UserError):
        link(server, retries=0)


@pytest.mark.parametrize("odd", [{"output_ids": ["a"]}, {"output_ids": [-1]}, {"finish": "stop"}])
def test_odd_answers_stop_the_call_and_leave_no_half_row(
    server: FakeSglang, odd: dict[str, Any]
) -> None:
    engine = connect(server, retries=1)
    plain = server.routes["POST /generate"]

    def strange(body: Any, headers: Any) -> Any:
        answers = plain(body, headers)
        if "output_ids" in odd:
            answers[-1]["output_ids"] += odd["output_ids"]
        else:
            answers[-1]["meta_info"]["finish_reason"] = odd["finish"]
        return answers

    server.routes = {**server.routes, "POST /generate": strange}
    with pytest.raises(UserError, match="without ids"):
        engine.generate(asked({}))
    engine.close()


def test_seeds_that_are_not_kept_are_refused_not_ignored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(deterministic=False) as server:
        engine = connect(server)
        assert "--enable-deterministic-inference" in caplog.text
        with pytest.raises(UserError, match="does not keep to seeds"):
            engine.generate([Request("a", None, Sampling(4, temperature=1.0))])
        assert texts(engine.generate(asked({}))) == expected(server, {})
        engine.close()


def test_no_more_adapters_than_the_server_keeps() -> None:
    with running(max_loaded=2) as server:
        engine = connect(server)
        with pytest.raises(UserError, match="--max-loaded-loras"):
            engine.load(tiny_adapters(server.model))
        engine.close()


def test_texts_end_where_sglang_ends_them(server: FakeSglang) -> None:
    engine = connect(server)
    word = tiny_prompts()[0]
    count = len(engine._model.encoder.encode(word))
    context = server.model.config.max_position_embeddings
    [done] = engine.generate([Request(word, None, Sampling(context))])
    [local] = server.engine.generate(
        [Request(engine._model.encoder.encode(word), None, Sampling(context - 2 - count))]  # type: ignore[arg-type]
    )
    assert (done.error, done.text) == (None, local.text)
    long = Request("ab " * (context - 7) + "ab", None, Sampling(1))
    tokens = len(engine._model.encoder.encode(long.prompt))
    assert context - 7 < tokens < context - 2, "the test's prompt is of another length"
    [refused] = engine.generate([long])
    assert f"the server takes {context - 7} at most" in str(refused.error)
    server.pool = 3
    with pytest.raises(UserError, match=r"after 3 of 8 tokens: its KV cache"):
        engine.generate(asked({}))
    engine.close()
