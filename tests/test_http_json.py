"""JSON over HTTP against servers that behave worse than HTTP's own: raw sockets answer here."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from loralab.engines.http_json import Failed, JsonClient, Silence, Unreachable, bearer
from loralab.errors import UserError

GOOD = b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"sum": 1}'
Speak = Callable[[socket.socket], None]


def request(link: socket.socket) -> bytes:
    """A whole one: what is left unread at the end is a reset to the client."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += link.recv(65536)
    head, _, body = got.partition(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    while len(body) < int(length or 0):
        body += link.recv(65536)
    return head + body


@contextmanager
def saying(*turns: bytes | Speak) -> Iterator[tuple[str, list[bytes]]]:
    """A server whose n-th connection gets the n-th turn; what it was asked."""
    asked: list[bytes] = []
    over = threading.Event()

    def serve() -> None:
        for turn in turns:
            with suppress(OSError):
                link, _ = listening.accept()
                with link:
                    link.settimeout(30)
                    asked.append(request(link))
                    if callable(turn):
                        turn(link)
                    else:
                        link.sendall(turn)
        over.set()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
    thread.join(30)


def client(url: str, retries: int = 0, timeout: float = 20.0, **rest: bool) -> JsonClient:
    return JsonClient(url, {}, timeout=timeout, retries=retries, wait=0.01, **rest)


def reset(link: socket.socket) -> None:
    """A refusal of which the half comes, and then a reset."""
    link.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\nbus")
    time.sleep(0.3)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_connection_that_breaks_in_a_refusal_is_that_refusal() -> None:
    with saying(reset) as (url, _), pytest.raises(Failed, match="HTTP 503") as told:
        client(url).post("x", {})
    assert told.value.of_server
    cut = b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nbus"
    with saying(cut, GOOD) as (url, asked):
        assert client(url, retries=1).post("x", {}) == {"sum": 1}
        assert len(asked) == 2


def test_an_answer_too_deep_for_json_is_a_failed_request() -> None:
    deep = b"[" * 200_000
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(deep) + deep
    with saying(answer) as (url, _), pytest.raises(Failed, match="no JSON"):
        client(url).post("x", {})


def test_a_get_is_asked_again_too_and_a_body_made_anew() -> None:
    busy = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
    with saying(busy, GOOD) as (url, _):
        assert client(url, retries=1).get("x") == {"sum": 1}
    made = iter(range(9))
    with saying(busy, GOOD) as (url, asked):
        client(url, retries=1).post("x", lambda: {"n": next(made)})
        assert len(asked) == 2
    assert next(made) == 2


def test_a_server_that_went_away_for_a_moment_is_asked_again() -> None:
    with saying(GOOD) as (url, _):
        asking = client(url, retries=60)
        with pytest.raises(Unreachable):
            client("http://127.0.0.1:9", retries=60).get("x")
        asking.get("x")
    port = int(url.rpartition(":")[2])
    back = threading.Timer(0.3, lambda: back_again.append(serve_once(port)))
    back_again: list[bool] = []
    back.start()
    assert asking.get("x") == {"sum": 1}
    back.join()


def serve_once(port: int) -> bool:
    with socket.create_server(("127.0.0.1", port)) as listening:
        link, _ = listening.accept()
        with link:
            request(link)
            link.sendall(GOOD)
    return True


def test_403_is_final_until_something_was_answered() -> None:
    forbidden = b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"
    with saying(forbidden, GOOD, forbidden) as (url, _):
        asking = client(url)
        with pytest.raises(UserError, match="HTTP 403"):
            asking.get("x")
        asking.get("x")
        with pytest.raises(Failed, match="HTTP 403") as told:
            asking.get("x")
    assert not told.value.of_server


@pytest.mark.parametrize("key", ["sk-secret\nX: y", "sk-secret\x00", "sk-secr\u00e9t", "sk-\u20ac"])
def test_a_key_that_no_header_can_hold_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    if "\x00" not in key:
        monkeypatch.setenv("A_KEY", key)
        with pytest.raises(UserError, match="A_KEY holds characters") as told:
            bearer("A_KEY", "endpoint x")
        assert "sk-" not in str(told.value)
    headers = {"Authorization": f"Bearer {key}\n"}
    with saying() as (url, _), pytest.raises(UserError, match="cannot be sent") as told:
        JsonClient(url, headers, timeout=5, retries=3, wait=0.01).post("x", {})
    assert "sk-" not in str(told.value)


def test_the_newline_of_a_key_that_was_read_from_a_file_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_KEY", "sk-secret\r\n")
    assert bearer("A_KEY", "x") == {"Authorization": "Bearer sk-secret"}
    monkeypatch.setenv("A_KEY", " \n")
    with pytest.raises(UserError, match="A_KEY is empty"):
        bearer("A_KEY", "x")


def slowly(link: socket.socket) -> None:
    """Headers at once and then a byte at a time, never done."""
    link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    with suppress(OSError):
        for _ in range(600):
            link.sendall(b" ")
            time.sleep(0.1)


def test_a_body_that_never_ends_is_given_up_in_time() -> None:
    with saying(slowly) as (url, _), pytest.raises(Silence, match="no answer in 1 s"):
        client(url, timeout=1.0).get("x")


def test_silence_is_not_asked_again_where_that_is_not_wanted() -> None:
    with saying(slowly, GOOD) as (url, asked):
        with pytest.raises(Silence):
            client(url, retries=3, timeout=0.5, again_after_silence=False).get("x")
        assert len(asked) == 1


def test_cancelling_reaches_a_body_that_is_being_read() -> None:
    headers = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"

    def hang(link: socket.socket) -> None:
        link.sendall(headers)
        with suppress(OSError):
            link.recv(1)  # until the client hangs up

    began = time.monotonic()
    with saying(hang) as (url, asked):
        asking = client(url, timeout=60.0)

        def ask(item: int) -> None:
            if item == 0:
                asking.post("x", {})
            while not asked:
                time.sleep(0.01)
            time.sleep(0.5)  # for the headers to be read

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            asking.ask_all(ask, [0, 1], 2, interrupt)
    assert time.monotonic() - began < 25


def test_what_a_server_says_is_told_on_one_plain_line() -> None:
    said = b"red \x1b[31mtext\r\nnext"
    answer = b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n" % len(said) + said
    with saying(answer) as (url, _), pytest.raises(Failed, match=r"HTTP 400: red \[31mtext next"):
        client(url).get("x")


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://h:abc", "ftp://h", "http://", "http://user:pass@h/v1"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError) as told:
        client(url)
    assert "pass@" not in str(told.value)
