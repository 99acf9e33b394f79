"""Distillation: what is kept of a teacher's answers, from an engine and from a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

import tiny
from loralab import pipeline
from loralab.config import DistillConfig, parse
from loralab.engines import endpoint
from loralab.engines.base import Request, Sampling
from loralab.engines.endpoint import EndpointEngine
from loralab.errors import UserError
from loralab.gradient.distill import ROWS
from loralab.gradient.events import Remark
from loralab.run import Run
from loralab.tasks.base import Message
from loralab.tasks.supervised import Supervised


class Handler(BaseHTTPRequestHandler):
    """Answers "ab" to prompts with an "a" in them, else "no"; the server's moods are below."""

    asked: ClassVar[list[tuple[str, dict[str, Any], Any]]] = []
    busy: ClassVar[int] = 0
    refuse: ClassVar[int | None] = None
    reason: ClassVar[str] = "stop"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body, self.headers.get("Authorization")))
        if type(self).refuse is not None:
            return self._send(type(self).refuse or 0, {"error": "no"})
        if type(self).busy > 0:
            type(self).busy -= 1
            return self._send(503, {"error": "busy"})
        chat = "messages" in body
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        text = "ab" if "a" in prompt else "no"
        choice: dict[str, Any] = {"finish_reason": self.reason}
        choice |= {"message": {"content": text}} if chat else {"text": text}
        return self._send(200, {"choices": [choice]})

    def _send(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(endpoint, "_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    Handler.asked.clear()
    Handler.busy, Handler.refuse, Handler.reason = 0, None, "stop"
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}/v1"
    made.shutdown()
    thread.join()
    made.server_close()


def test_messages_go_to_chat_text_to_completions_with_all_settings(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "open")
    engine = EndpointEngine(server, "big", key_variable="A_KEY")
    sampling = Sampling(7, temperature=0.5, top_p=0.9, seed=2**40 + 3, stop=("x",))
    requests = [
        Request("a b", sampling=sampling),
        Request([Message(role="user", content="c")], sampling=sampling),
    ]
    ticks: list[tuple[int, int]] = []
    answers = engine.generate(requests, lambda done, of: ticks.append((done, of)))
    assert [(a.text, a.finish_reason) for a in answers] == [("ab", "stop"), ("no", "stop")]
    assert ticks == [(1, 2), (2, 2)]
    asked = {path: (body, key) for path, body, key in Handler.asked}
    body, key = asked["/v1/completions"]
    assert key == "Bearer open"
    assert body == {
        "model": "big", "prompt": "a b", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9,
        "seed": 3 + 2**40 % 2**31, "stop": ["x"],
    }  # fmt: skip
    assert asked["/v1/chat/completions"][0]["messages"] == [{"role": "user", "content": "c"}]


def test_a_busy_server_is_asked_again_and_then_given_up(server: str) -> None:
    engine = EndpointEngine(server, "big", workers=1, retries=2)
    Handler.busy = 2
    assert engine.generate([Request("a")])[0].text == "ab"
    Handler.busy = 3
    failed = engine.generate([Request("a")])[0]
    assert failed.finish_reason == "error"
    assert "HTTP 503" in (failed.error or "")


def test_a_server_that_refuses_or_is_not_there_ends_the_run(server: str) -> None:
    Handler.refuse = 404
    with pytest.raises(UserError, match="HTTP 404"):
        EndpointEngine(server, "big").generate([Request("a")])
    with pytest.raises(UserError, match="cannot be reached"):
        EndpointEngine("http://127.0.0.1:9/v1", "big").generate([Request("a")])
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        EndpointEngine(server, "big", key_variable="NO_SUCH_KEY")
    with pytest.raises(UserError, match="expected http"):
        EndpointEngine("file:///etc/passwd", "big")


def config_for(path: Path, **changes: Any) -> DistillConfig:
    rows = [{"prompt": tiny.words(3, i), "completion": "ab"} for i in range(20)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    values: dict[str, Any] = {
        "kind": "distill",
        "name": "tiny",
        "model": "big",
        "task": {"name": "supervised", "options": {"path": str(path / "rows.jsonl")}},
        "samples": 3,
        "batch": 5,
        "generation": {"max_new_tokens": 4, "temperature": 1.0},
        **changes,
    }
    made = parse(values, "test")
    assert isinstance(made, DistillConfig)
    return made


def kept(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / ROWS).read_text().splitlines()]


def test_what_scores_is_kept_once_and_a_stopped_run_goes_on(server: str, tmp_path: Path) -> None:
    config = config_for(tmp_path, endpoint={"url": server, "workers": 2})
    _, result = pipeline.start(config, tmp_path / "whole", lambda event: None)
    assert result.complete
    rows = kept(tmp_path / "whole")
    right = [row for row in rows if "a" in row["prompt"]]
    assert rows == right
    assert {row["completion"] for row in rows} == {"ab"}
    assert len({row["example"] for row in rows}) == len(rows) < 18
    last = Run.open(tmp_path / "whole").metrics()[-1]
    assert (last["completions"], last["kept"], last["solved"]) == (54, len(rows), len(rows))

    batches: list[str] = []

    def stop(event: Any) -> None:
        if isinstance(event, Remark):
            batches.append(event.text)
            if len(batches) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.start(config, tmp_path / "cut", stop)
    # Half of a batch was written before the power went.
    with (tmp_path / "cut" / ROWS).open("a") as file:
        file.write(json.dumps({**rows[0], "batch": 2}) + '\n{"prompt": "to')
    Handler.asked.clear()
    pipeline.resume(tmp_path / "cut", None, lambda event: None)
    assert len(Handler.asked) == (18 - 10) * 3
    assert kept(tmp_path / "cut") == rows
    # The fine-tuning reads them.
    read = Supervised(path=str(tmp_path / "cut" / ROWS), test_share=0.2)
    assert len(read.examples("train")) + len(read.examples("test")) == len(rows)


def test_an_answer_that_was_cut_off_is_no_lesson(server: str, tmp_path: Path) -> None:
    Handler.reason = "length"
    config = config_for(tmp_path, endpoint={"url": server})
    with pytest.raises(UserError, match="none of 54 completions scored"):
        pipeline.start(config, tmp_path / "run", lambda event: None)
    assert Run.open(tmp_path / "run").metrics()[-1]["cut"] > 0


def test_an_engine_can_be_the_teacher(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    config = config_for(
        tmp_path, model=str(tmp_path / "model"), dtype="float32", device="cpu", min_reward=0.0,
        generation={"max_new_tokens": 30, "temperature": 1.0},
    )  # fmt: skip
    pipeline.start(config, tmp_path / "run", lambda event: None)
    last = Run.open(tmp_path / "run").metrics()[-1]
    assert last["kept"] + last["cut"] <= last["completions"] == 54
    assert last["kept"] == len(kept(tmp_path / "run")) > 5
