"""Completions from an OpenAI-compatible server, by plain HTTP."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

from loralab.adapters.state import AdapterState
from loralab.engines.base import Completion, Progress, Request
from loralab.errors import UserError

_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_REFUSED = frozenset({401, 403, 404})
_WAIT = 1.0
"""Seconds before the first retry; each later one waits twice as long."""


class EndpointEngine:
    """An engine whose model runs on a server: messages go to /chat/completions, text to
    /completions.

    url: up to and with the version ("http://localhost:8000/v1"). model: its name there.
    key_variable: the environment variable that holds the key. workers: requests at one time.
    timeout: seconds. retries: of a request the server was too busy for.

    Completions have no token ids: servers do not send them. `seed` is sent along; whether it is
    kept to is the server's affair.
    """

    accepts: frozenset[str] = frozenset()

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        workers: int = 8,
        timeout: float = 120.0,
        retries: int = 3,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"endpoint {url!r}: expected http:// or https://")
        self._url = url.rstrip("/")
        self._model = model
        self._workers = workers
        self._timeout = timeout
        self._retries = retries
        self._headers = {"Content-Type": "application/json"}
        if key_variable is not None:
            key = os.environ.get(key_variable)
            if not key:
                raise UserError(f"endpoint {url}: the environment variable {key_variable} is empty")
            self._headers["Authorization"] = f"Bearer {key}"

    @property
    def kernel(self) -> str:
        return f"endpoint {self._url}"

    def load(self, adapters: Mapping[str, AdapterState]) -> None:
        """Nothing can be loaded into a server's model. Raises UserError where something should."""
        if adapters:
            raise UserError(f"endpoint {self._url}: adapters cannot be loaded; name them as models")

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[Completion]:
        """Completions in the order of the requests.

        Raises:
            UserError: the server is not there, or refuses the model or the key.
        """
        found: list[Completion] = []
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for completion in pool.map(self._one, requests):
                    found.append(completion)
                    if progress is not None:
                        progress(len(found), len(requests))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _one(self, request: Request) -> Completion:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._model if request.adapter is None else request.adapter,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed % 2**31,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if isinstance(request.prompt, str):
            path, body["prompt"] = "completions", request.prompt
        else:
            path, body["messages"] = "chat/completions", list(request.prompt)
        try:
            return _completion(self._post(path, body))
        except _Failed as error:
            return Completion("", (), "error", str(error))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        address = f"{self._url}/{path}"
        data = json.dumps(body).encode()
        for attempt in range(self._retries + 1):
            request = HttpRequest(address, data, self._headers, method="POST")
            try:
                with urlopen(request, timeout=self._timeout) as answer:
                    return json.loads(answer.read())
            except HTTPError as error:
                said = error.read(500).decode("utf-8", "replace")
                why = f"{address}: HTTP {error.code}: {' '.join(said.split())}"
                if error.code in _REFUSED:
                    raise UserError(why) from error
                if error.code not in _BUSY or attempt == self._retries:
                    raise _Failed(why) from error
            except TimeoutError as error:
                if attempt == self._retries:
                    raise _Failed(f"{address}: no answer in {self._timeout:g} s") from error
            except URLError as error:
                raise UserError(f"{address}: cannot be reached: {error.reason}") from error
            except (HTTPException, ConnectionError, ValueError) as error:
                if attempt == self._retries:
                    raise _Failed(f"{address}: no JSON came back: {error}") from error
            time.sleep(_WAIT * 2**attempt)
        raise AssertionError("every attempt returns or raises")


class _Failed(Exception):
    """One request has no completion; others may."""


def _completion(answer: Any) -> Completion:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError) as error:
        raise _Failed(f"an answer without a choice: {str(answer)[:200]}") from error
    if not isinstance(text, str):
        raise _Failed(f"an answer without text: {str(choice)[:200]}")
    return Completion(text, (), "length" if reason == "length" else "stop")
