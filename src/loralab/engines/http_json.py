"""JSON over HTTP for engines whose model runs on a server: bounded retries, and a way out.

A request that a thread waits for ends at once when another one fails or the user interrupts: its
socket is shut. Redirects are not followed, which would carry the key elsewhere, and a server on
this machine is never asked through a proxy.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
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
REFUSED = frozenset({401, 403, 404})
"""Answers that every request would get."""
LONGEST_WAIT = 30.0
"""Seconds between two attempts at most."""


class Failed(Exception):
    """One request has no answer; others may.

    status: HTTP's, None where none came. pause: seconds until the server wants to be asked again.
    """

    def __init__(self, why: str, status: int | None = None, pause: float | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.pause = pause


class Unreachable(UserError):
    """Nothing listens there."""


class Cancelled(Exception):
    """Another thread's error ended this request, which was under way or waited to be sent again."""


Item = TypeVar("Item")
Answer = TypeVar("Answer")


class JsonClient:
    """Asks one server, from as many threads as there are.

    timeout: seconds without a byte. retries: of a request that the server was too busy for or whose
    connection broke, after `wait` seconds, each time twice as long and a little random, or as long
    as the server says (Retry-After), never over half a minute.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout: float,
        retries: int,
        wait: float,
    ) -> None:
        if not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
            raise UserError(f"endpoint {url!r}: expected http:// or https:// and a host")
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json", **headers}
        self._timeout = timeout
        self._retries = retries
        self._wait = wait
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._open: WeakSet[HTTPConnection] = WeakSet()
        self._opener = self._make_opener()

    def get(self, path: str, *, timeout: float | None = None) -> Any:
        """The answer to one attempt. Raises as `post`; an empty body is None."""
        return self._attempt(self._request(path, None), timeout or self._timeout)

    def post(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> Any:
        """The answer's JSON, None for an empty body. `headers` come on top of the client's.

        Raises:
            UserError: the server refuses the key, the model or the path.
            Unreachable: nothing listens there (a UserError too).
            Failed: this request has no answer, after the retries.
            Cancelled: see `ask_all`.
        """
        request = self._request(path, json.dumps(body).encode(), headers)
        for attempt in range(self._retries + 1):
            try:
                return self._attempt(request, self._timeout)
            except Failed as error:
                last = attempt == self._retries
                if last or not (error.status is None or error.status in BUSY):
                    raise
                pause = error.pause or self._wait * 2**attempt
            # Requests that were turned away together should not all come back together.
            pause = min(pause * random.uniform(1, 1.25), LONGEST_WAIT)
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
                futures = {pool.submit(ask, item): item for item in items}
                try:
                    for future in as_completed(futures):
                        done(futures[future], future.result())
                except BaseException:
                    self._cancel()
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

    def _attempt(self, request: Request, timeout: float) -> Any:
        address = request.full_url
        if self._cancelled.is_set():
            raise Cancelled
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                body = answer.read()
                return json.loads(body) if body else None
        except HTTPError as error:
            self._leave_if_cancelled()
            raise _refusal(address, error) from error
        except (URLError, HTTPException, OSError, ValueError) as error:
            self._leave_if_cancelled()
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, TimeoutError):
                raise Failed(f"{address}: no answer in {timeout:g} s") from error
            if isinstance(reason, ConnectionError) and not isinstance(
                reason, ConnectionRefusedError
            ):
                raise Failed(f"{address}: the connection broke: {reason}") from error
            if isinstance(error, URLError):
                raise Unreachable(f"{address}: cannot be reached: {reason}") from error
            raise Failed(f"{address}: no JSON came back: {error}") from error

    def _leave_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def _make_opener(self) -> OpenerDirector:
        client = self

        class Plain(HTTPConnection):
            def connect(self) -> None:
                super().connect()
                client._take_in(self)

        class Secure(HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                client._take_in(self)

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

    def _take_in(self, connection: HTTPConnection) -> None:
        with self._lock:
            self._open.add(connection)
            if self._cancelled.is_set():
                _shut(connection)


class _StayHere(HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _refusal(address: str, error: HTTPError) -> Exception:
    said = error.read(500).decode("utf-8", "replace")
    why = f"{address}: HTTP {error.code}: {' '.join(said.split())}"
    if error.code in REFUSED:
        return UserError(why)
    after = error.headers.get("Retry-After", "")
    return Failed(why, error.code, float(after) if after.isdecimal() else None)


def _shut(connection: HTTPConnection) -> None:
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


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
        UserError: the variable is empty.
    """
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise UserError(f"{what}: the environment variable {variable} is empty")
    return {"Authorization": f"Bearer {key}"}
