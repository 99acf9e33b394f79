"""JSON over HTTP for engines whose model runs on a server: bounded retries, and a way out.

A request that a thread waits for ends at once when another one fails or the user interrupts: its
socket is shut, whatever part of the answer has come. Redirects are not followed, which would carry
the key elsewhere, and a server on this machine is never asked through a proxy.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    build_opener,
)
from weakref import WeakSet

from loralab.errors import UserError

BUSY = frozenset({408, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed."""
REFUSED = frozenset({401, 404})
"""Answers that every request would get. So is 403, from a server that has answered nothing else:
some gateways say it of one prompt."""
LONGEST_WAIT = 30.0
"""Seconds between two attempts at most."""
LONGEST_CONNECT = 30.0
"""Seconds that a connection may take to be made, and a cancelled one therefore at most."""
LARGEST = 2**28
"""Bytes of an answer at most."""
_CHUNK = 2**16


class Failed(Exception):
    """One request has no answer; others may.

    status: HTTP's, None where none came. pause: seconds until the server wants to be asked again.
    """

    def __init__(self, why: str, status: int | None = None, pause: float | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.pause = pause

    @property
    def of_server(self) -> bool:
        """Whether it is the server that failed: what it was asked may be in order."""
        return self.status is None or self.status in BUSY or self.status >= 500


class Silence(Failed):
    """No answer came in time."""


class Unreachable(UserError):
    """Nothing listens there."""


class Refused(UserError):
    """The server answers nothing without another key, model or path. status: HTTP's."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status = status


class Cancelled(Exception):
    """Another thread's error ended this request, which was under way or waited to be sent again."""


Item = TypeVar("Item")
Answer = TypeVar("Answer")


class JsonClient:
    """Asks one server, from as many threads as there are.

    timeout: seconds that an answer may take. retries: of a request that the server was too busy for
    or whose connection broke, after `wait` seconds, each time twice as long and a little random, or
    as long as the server says (Retry-After), never over half a minute; where nothing listens any
    more after an answer had come, too. again_after_silence: whether a request that had no answer in
    time is one of those.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout: float,
        retries: int,
        wait: float,
        again_after_silence: bool = True,
    ) -> None:
        _check(url)
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json", **headers}
        self._timeout = timeout
        self._retries = retries
        self._wait = wait
        self._again_after_silence = again_after_silence
        self._answered = False
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._open: WeakSet[socket.socket] = WeakSet()
        self._opener = self._make_opener()

    def get(self, path: str) -> Any:
        """The answer's JSON. Raises as `post`; an empty body is None."""
        return self._persist(lambda: self._request(path, None))

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The answer's JSON, None for an empty body. `headers` come on top of the client's.

        body: what is sent, or a function that gives it for each attempt.

        Raises:
            Refused: the server refuses the key, the model or the path (a UserError).
            Unreachable: nothing listens there (a UserError too).
            Failed: this request has no answer, after the retries.
            Cancelled: see `ask_all`.
        """
        made = body if callable(body) else lambda: body
        return self._persist(lambda: self._request(path, json.dumps(made()).encode(), headers))

    def _persist(self, make: Callable[[], Request]) -> Any:
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            pause = None
            try:
                answer = self._attempt(make())
                self._answered = True
                return answer
            except Unreachable:
                if last or not self._answered:
                    raise
            except Failed as error:
                if last or not (error.status is None or error.status in BUSY):
                    raise
                if isinstance(error, Silence) and not self._again_after_silence:
                    raise
                pause = error.pause
            # Requests that were turned away together should not all come back together.
            pause = min((pause or self._wait * 2**attempt) * random.uniform(1, 1.25), LONGEST_WAIT)
            if self._cancelled.wait(pause):
                raise Cancelled
        raise AssertionError("every attempt returns or raises")

    def ask_all(
        self,
        ask: Callable[[Item], Answer],
        items: Sequence[Item],
        workers: int,
        done: Callable[[Item, Answer], None],
    ) -> None:
        """`ask` each item in one of `workers` threads, and tell each answer in this one.

        What `ask` or `done` raises, and KeyboardInterrupt, ends the requests that are under way;
        the client then takes others.
        """
        try:
            with ThreadPoolExecutor(workers) as pool:
                futures: dict[Future[Answer], Item] = {}
                try:
                    for item in items:
                        futures[pool.submit(ask, item)] = item
                    for future in as_completed(futures):
                        done(futures[future], future.result())
                except BaseException:
                    self._cancel()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            self._cancelled.clear()

    def _cancel(self) -> None:
        self._cancelled.set()
        with self._lock:
            for connection in self._open:
                _shut(connection)

    def _request(
        self, path: str, data: bytes | None, headers: Mapping[str, str] | None = None
    ) -> Request:
        method = "GET" if data is None else "POST"
        return Request(
            f"{self.url}/{path}", data, {**self._headers, **(headers or {})}, method=method
        )

    def _attempt(self, request: Request) -> Any:
        address = request.full_url
        self._leave_if_cancelled()
        body = self._exchange(request, address)
        try:
            return json.loads(body) if body else None
        except (ValueError, RecursionError) as error:
            raise Failed(f"{address}: no JSON came back: {_line(str(error))}") from error

    def _exchange(self, request: Request, address: str) -> bytes:
        """The body of an answer, or why there is none as `_attempt` raises it."""
        late = f"{address}: no answer in {self._timeout:g} s"
        deadline = time.monotonic() + self._timeout
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                body = bytearray()
                while part := answer.read1(_CHUNK):
                    body += part
                    if len(body) > LARGEST:
                        raise Failed(f"{address}: an answer of over {LARGEST} bytes")
                    if time.monotonic() > deadline:
                        raise Silence(late)
                if answer.length:
                    raise IncompleteRead(b"", answer.length)
                return bytes(body)
        except HTTPError as error:
            refusal = _refusal(address, error, final=not self._answered)
            self._leave_if_cancelled()
            raise refusal from error
        except (URLError, HTTPException, OSError) as error:
            self._leave_if_cancelled()
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, TimeoutError):
                raise Silence(late) from error
            if isinstance(reason, ConnectionError) and not isinstance(
                reason, ConnectionRefusedError
            ):
                raise Failed(f"{address}: the connection broke: {reason}") from error
            if isinstance(error, URLError):
                raise Unreachable(f"{address}: cannot be reached: {reason}") from error
            raise Failed(f"{address}: no whole answer came: {_line(str(error))}") from error
        except ValueError as error:
            # Of something that was to be sent, which its text may repeat: the key for one.
            raise UserError(
                f"{address}: the request cannot be sent ({type(error).__name__} in its address or "
                "headers): look at the key and the url"
            ) from None

    def _leave_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def _make_opener(self) -> OpenerDirector:
        client = self

        class Plain(HTTPConnection):
            def connect(self) -> None:
                timeout, self.timeout = self.timeout, _to_connect(self.timeout)
                super().connect()
                client._take_in(self.sock, timeout)

        class Secure(HTTPSConnection):
            def connect(self) -> None:
                timeout, self.timeout = self.timeout, _to_connect(self.timeout)
                super().connect()
                client._take_in(self.sock, timeout)

        class OpenPlain(HTTPHandler):
            def http_open(self, request: Request) -> Any:
                return self.do_open(Plain, request)

        class OpenSecure(HTTPSHandler):
            def https_open(self, request: Request) -> Any:
                return self.do_open(Secure, request)

        handlers = [OpenPlain(), OpenSecure(), _StayHere()]
        if is_loopback(self.url):
            return build_opener(ProxyHandler({}), *handlers)
        return build_opener(*handlers)

    def _take_in(self, connection: socket.socket, timeout: float | None) -> None:
        """Keep the socket itself: urllib lets go of the connection once the headers are in."""
        connection.settimeout(timeout)
        with self._lock:
            self._open.add(connection)
            if self._cancelled.is_set():
                _shut(connection)


class _StayHere(HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _check(url: str) -> None:
    """Raise UserError unless it is the address of a server, without a password in it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"endpoint {url!r}: {error}: expected http://host:port") from error
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"endpoint {parts.scheme}://...@{host}: a name or password in the address would be "
            "written to logs: leave it out, and name the variable that holds the key"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"endpoint {url!r}: expected http:// or https:// and a host")


def _to_connect(timeout: float | None) -> float:
    return LONGEST_CONNECT if timeout is None else min(timeout, LONGEST_CONNECT)


def _refusal(address: str, error: HTTPError, final: bool) -> Exception:
    """final: whether the server has answered nothing yet."""
    said = b""
    # The connection may break while it says why.
    with error, suppress(OSError, HTTPException):
        said = error.read(500)
    why = f"{address}: HTTP {error.code}: {_line(said.decode('utf-8', 'replace'))}"
    if error.code in REFUSED or (error.code == 403 and final):
        return Refused(why, error.code)
    after = error.headers.get("Retry-After", "")
    return Failed(why, error.code, float(after) if after.isdecimal() else None)


def _line(text: str) -> str:
    """On one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def is_loopback(url: str) -> bool:
    """Whether the address is on this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def bearer(variable: str | None, what: str) -> dict[str, str]:
    """The header with the key that an environment variable holds; {} without a variable.

    Raises:
        UserError: the variable is empty, or holds what no header can.
    """
    if variable is None:
        return {}
    # Secrets that are read from files end with a newline.
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"{what}: the environment variable {variable} is empty")
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"{what}: the environment variable {variable} holds characters that no key has (a line "
            "break, or letters beyond ASCII): set it to the key alone"
        )
    return {"Authorization": f"Bearer {key}"}
