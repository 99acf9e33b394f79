"""The serving contract, as far as it goes, on a server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import tiny
from loralab import cli
from loralab.engines import endpoint
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.engines.endpoint import EndpointEngine
from loralab.errors import UserError
from model_server import Answer, Answerer, ModelServer, serving
from serving_contract import ServingContract, Subject, ending_request, tiny_prompts

NAME = "tiny"
CONTEXT = 96


def routes(answerer: Answerer) -> dict[str, Any]:
    def complete(body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
        if body["model"] != NAME:
            raise Answer(404, {"error": {"message": f"The model `{body['model']}` is not here"}})
        chat = "messages" in body
        sampling = Sampling(
            body["max_tokens"],
            temperature=body["temperature"],
            top_k=body.get("top_k", 0),
            top_p=body["top_p"],
            seed=body["seed"],
            stop=tuple(body.get("stop", ())),
        )
        [done] = answerer([Request(body["messages" if chat else "prompt"], None, sampling)])
        if done.error is not None:
            raise Answer(400, {"error": {"message": done.error}})
        said = {"message": {"content": done.text}} if chat else {"text": done.text}
        return {"choices": [{**said, "finish_reason": done.finish_reason}]}

    return {"POST /v1/completions": complete, "POST /v1/chat/completions": complete}


class TestContract(ServingContract):
    loads_adapters = False
    gives_tokens = False

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls) -> Iterator[Subject]:
        local = BatchedEngine(tiny.model("llama"), tiny.tokenizer(), backend="torch", threads=1)
        ends = frozenset({tiny.EOS})
        ending = ending_request(local, ends)
        with serving(ModelServer(routes(Answerer(local)))) as server:
            engine = EndpointEngine(f"{server.url}/v1", NAME)
            prompts = [*tiny_prompts(), *(tiny.words(5, seed) for seed in range(4))]
            yield Subject(engine, {}, prompts, ending, ends, CONTEXT)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """Answers with the prompt."""
    monkeypatch.setattr(endpoint, "_WAIT", 0.01)

    def echo(body: Mapping[str, Any], _: Mapping[str, str]) -> Any:
        return {"choices": [{"text": body["prompt"], "finish_reason": "stop"}]}

    with serving(ModelServer({"POST /completions": echo})) as made:
        yield made


def test_what_a_connection_loses_is_asked_again(server: ModelServer) -> None:
    server.faults.add("/completions", "drop", "busy", "cut", "garbage")
    engine = EndpointEngine(server.url, "m", workers=2, retries=4)
    requests = [Request(f"p{i}") for i in range(6)]
    assert [done.text for done in engine.generate(requests)] == [f"p{i}" for i in range(6)]
    assert len(server.faults.met) == 4
    assert len(server.asked) == 10


def test_silence_is_given_up_for_its_request_alone(server: ModelServer) -> None:
    engine = EndpointEngine(server.url, "m", workers=1, retries=0, timeout=0.5)
    server.faults.add("/completions", 3.0)
    first, second = engine.generate([Request("a"), Request("b")])
    assert (first.finish_reason, second.text) == ("error", "b")
    assert "no answer in 0.5 s" in str(first.error)


def test_no_more_requests_at_one_time_than_workers(server: ModelServer) -> None:
    server.faults.add("/completions", *[0.05] * 12)
    EndpointEngine(server.url, "m", workers=3).generate([Request(f"p{i}") for i in range(12)])
    assert server.most == 3


def test_cancelling_does_not_wait_for_slow_answers(server: ModelServer) -> None:
    engine = EndpointEngine(server.url, "m", workers=5)
    server.faults.add("/completions", *[60.0] * 4)
    began = time.perf_counter()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    # Four workers wait; the fifth has an answer and the user has had enough.
    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request(f"p{i}") for i in range(40)], interrupt)
    assert time.perf_counter() - began < 30
    assert len(server.asked) < 40
    assert engine.generate([Request("again")])[0].text == "again"


def test_a_key_follows_no_redirect(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    other = ModelServer({"GET /stolen": lambda *_: {}, "POST /stolen": lambda *_: {}})
    with serving(other):

        def elsewhere(*_: Any) -> Any:
            raise Answer(302, None)

        server.routes = {"POST /completions": elsewhere}
        monkeypatch.setattr(
            "model_server._Handler.end_headers",
            lambda self: (
                self.send_header("Location", f"{other.url}/stolen"),
                super(type(self), self).end_headers(),
            ),
        )
        engine = EndpointEngine(server.url, "m", key_variable="A_KEY", retries=0)
        [done] = engine.generate([Request("a")])
    assert "HTTP 302" in str(done.error)
    assert other.asked == []


def test_a_server_here_is_asked_without_a_proxy(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert EndpointEngine(server.url, "m").generate([Request("a")])[0].text == "a"


def test_adapters_cannot_be_loaded(server: ModelServer) -> None:
    engine = EndpointEngine(server.url, "m")
    with pytest.raises(UserError, match="name them as models"):
        engine.load({"a": tiny.adapter(tiny.model("llama"), seed=1)})


def test_a_model_on_a_server_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("A_KEY", "secret")

    def short(body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
        assert headers["Authorization"] == "Bearer secret"
        return {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}

    words = ["eval", NAME, "--task", "conciseness", "--limit", "3", "--json"]
    with serving(ModelServer({"POST /v1/chat/completions": short})) as server:
        where = ["--endpoint", f"{server.url}/v1", "--key-variable", "A_KEY"]
        assert cli.main([*words, *where, "--out", str(tmp_path / "out")]) == 0
        assert len(server.asked) == 3
        assert {body["model"] for body in server.bodies("/v1/chat/completions")} == {NAME}
        assert cli.main([*words, *where, "--adapter", "x", "--out", str(tmp_path / "b")]) == 2
        assert cli.main([*words, *where, "--device", "cpu", "--out", str(tmp_path / "b")]) == 2
    told = json.loads(capsys.readouterr().out)
    assert [row["completion"] for row in told["completions"]] == ["yes"] * 3
    assert cli.main([*words, "--key-variable", "A_KEY", "--out", str(tmp_path / "c")]) == 2
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert server.url in config
    assert "secret" not in config


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "function_call"])
def test_a_text_that_was_cut_is_no_answer(server: ModelServer, reason: str) -> None:
    def said(body: Mapping[str, Any], _: Mapping[str, str]) -> Any:
        given = {"a": reason, "b": None, "c": "length"}[body["prompt"]]
        return {"choices": [{"text": "half", "finish_reason": given}]}

    server.routes = {"POST /completions": said}
    cut, *whole = EndpointEngine(server.url, "m").generate([Request(p) for p in "abc"])
    assert (cut.text, cut.finish_reason) == ("", "error")
    assert repr(reason) in str(cut.error)
    assert [done.finish_reason for done in whole] == ["stop", "length"]


def refusing(*_: Any) -> Any:
    raise Answer(400, {"error": "max_tokens is not supported"})


def test_a_server_that_fails_every_request_is_not_asked_them_all(server: ModelServer) -> None:
    engine = EndpointEngine(server.url, "m", workers=1)
    assert engine.generate([Request("a")])[0].error is None
    echo, server.routes = server.routes, {"POST /completions": refusing}
    later = engine.generate([Request("a")] * 20)
    assert all("max_tokens is not" in str(done.error) for done in later)
    fresh = EndpointEngine(server.url, "m", workers=1)
    with pytest.raises(UserError, match=r"8 requests failed and none was answered.*max_tokens"):
        fresh.generate([Request("a")] * 200)
    assert len(server.asked) < 1 + 20 + 100
    server.routes = echo
    assert fresh.generate([Request("a")])[0].text == "a"


def test_an_evaluation_without_one_answer_does_not_end_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", NAME, "--task", "conciseness", "--limit", "3", "--out", str(tmp_path / "out")]
    with serving(ModelServer({"POST /v1/chat/completions": refusing})) as server:
        assert cli.main([*words, "--endpoint", f"{server.url}/v1"]) == 1
    assert "says nothing of the model" in capsys.readouterr().err
