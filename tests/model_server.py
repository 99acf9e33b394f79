"""A local HTTP server whose answers come from an engine in this process, with faults on demand."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loralab.engines.base import Completion, Engine, Request


class Answer(Exception):
    """Ends a route with this status and JSON."""

    def __init__(self, status: int, value: Any) -> None:
        super().__init__(status, value)
        self.status, self.value = status, value


Route = Callable[[Any, Mapping[str, str]], Any]


@dataclass
class Faults:
    """What happens to the next requests of a path, each once, before they reach its route.

    "busy": 503. "drop": the connection breaks before an answer. "cut": in the middle of one.
    "garbage": no JSON. A number: so many seconds of silence first.
    """

    coming: dict[str, deque[str | float]] = field(default_factory=dict)
    met: list[tuple[str, str | float]] = field(default_factory=list)

    def add(self, path: str, *kinds: str | float) -> None:
        self.coming.setdefault(path, deque()).extend(kinds)

    def next(self, path: str) -> str | float | None:
        queue = self.coming.get(path)
        if not queue:
            return None
        try:
            kind = queue.popleft()
        except IndexError:
            return None
        self.met.append((path, kind))
        return kind


class ModelServer(ThreadingHTTPServer):
    """Routes by "METHOD /path"; `asked` holds (path, body, headers) of each request."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, routes: Mapping[str, Route], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.routes = routes
        self.faults = Faults()
        self.asked: list[tuple[str, Any, Mapping[str, str]]] = []
        self.most, self.now = 0, 0
        self.count = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self, path: str) -> list[Any]:
        """Bodies that were sent to a path."""
        return [body for asked, body, _ in self.asked if asked == path]

    def lose(self, path: str, body: Any) -> None:
        """Told of a request whose client may ask again while it is under way."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that went away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: ModelServer

    def do_GET(self) -> None:
        self._serve("GET", None)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._serve("POST", json.loads(self.rfile.read(length)))

    def _serve(self, method: str, body: Any) -> None:
        server = self.server
        server.asked.append((self.path, body, dict(self.headers)))
        fault = server.faults.next(self.path)
        with server.count:
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            answer = self._answer(method, body, fault)
        finally:
            # Before the answer goes out, after which the client may ask again.
            with server.count:
                server.now -= 1
        if answer is None:
            return self._hang_up()
        return self._send(*answer, cut=fault == "cut")

    def _answer(
        self, method: str, body: Any, fault: str | float | None
    ) -> tuple[int, bytes] | None:
        """Status and body, None to hang up."""
        if fault == "drop" or isinstance(fault, float):
            self.server.lose(self.path, body)
        if isinstance(fault, float):
            time.sleep(fault)
        if fault == "drop":
            return None
        if fault == "busy":
            return 503, b'{"error": "busy"}'
        if fault == "garbage":
            return 200, b"<html>"
        route = self.server.routes.get(f"{method} {self.path}")
        if route is None:
            return 404, b'{"detail": "Not Found"}'
        try:
            status, value = 200, route(body, dict(self.headers))
        except Answer as answer:
            status, value = answer.status, answer.value
        return status, b"" if value is None else json.dumps(value).encode()

    def _send(self, status: int, data: bytes, cut: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def serving(server: ModelServer) -> Iterator[ModelServer]:
    """The server at work in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Answerer:
    """An engine that many threads ask, one at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.lock = threading.Lock()

    def __call__(self, requests: list[Request]) -> list[Completion]:
        with self.lock:
            return self.engine.generate(requests)
