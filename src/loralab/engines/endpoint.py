"""Completions from an OpenAI-compatible server, by plain HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.adapters.state import AdapterState
from loralab.engines.base import Completion, FinishReason, Progress, Request
from loralab.engines.http_json import Failed, JsonClient, bearer
from loralab.errors import UserError

_WAIT = 1.0
"""Seconds before the first retry; each later one waits twice as long."""
_HOPELESS = 8
"""Requests that fail before any is answered, after which no more are asked."""
_REASONS: Mapping[str | None, FinishReason] = {
    None: "stop",
    "stop": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
}
"""The protocol's words and those of text-generation-inference. The others, such as a filter's or a
tool's, are not said of a whole answer."""


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
        self._url = url.rstrip("/")
        self._model = model
        self._workers = workers
        headers = bearer(key_variable, f"endpoint {url}")
        self._client = JsonClient(url, headers, timeout=timeout, retries=retries, wait=_WAIT)
        self._answered = False

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
            UserError: the server is not there, refuses the model or the key, or has failed every
                request so far, eight at least.
        """
        found: dict[int, Completion] = {}
        failed = 0

        def done(index: int, completion: Completion) -> None:
            nonlocal failed
            found[index] = completion
            if completion.error is None:
                self._answered = True
            elif requests[index].prompt:
                failed += 1
            if not self._answered and failed >= _HOPELESS:
                raise UserError(
                    f"endpoint {self._url}: {failed} requests failed and none was answered; the "
                    f"last: {completion.error}"
                )
            if progress is not None:
                progress(len(found), len(requests))

        self._client.ask_all(
            lambda index: self._one(requests[index]), range(len(requests)), self._workers, done
        )
        return [found[index] for index in range(len(requests))]

    def _one(self, request: Request) -> Completion:
        if not request.prompt:
            return Completion("", (), "error", "the prompt is empty")
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
            return _completion(self._client.post(path, body))
        except Failed as error:
            return Completion("", (), "error", str(error))


def _completion(answer: Any) -> Completion:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError) as error:
        raise Failed(f"an answer without a choice: {str(answer)[:200]}") from error
    if not isinstance(text, str):
        raise Failed(f"an answer without text: {str(choice)[:200]}")
    if reason not in _REASONS:
        raise Failed(f"an answer that was ended by {str(reason)[:80]!r}")
    return Completion(text, (), _REASONS[reason])
