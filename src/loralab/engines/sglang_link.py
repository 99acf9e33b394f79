"""One SGLang server over HTTP: what it is, its adapters, its completions, and its return."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.config import SglangConfig
from loralab.engines.http_json import Failed, JsonClient, Refused
from loralab.engines.own_server import OwnServer
from loralab.errors import UserError

_log = logging.getLogger(__name__)

_WAIT = 0.5
"""Seconds before the first retry; each later one waits twice as long."""
_LOOK = 0.5
"""Seconds between two looks for a server that is gone."""
_HEALTH = 30.0
"""Seconds that a look may take: the server answers after it has generated a token."""
_PARTING = 10.0
"""Seconds that a server may take to forget an adapter when the engine closes."""
_RESERVED, _RESERVED_OF_PROMPT = 2, 7
"""Tokens of the context that SGLang leaves free: beside prompt and completion (`Scheduler`'s
`max_req_len - input_len - 1`, that being one below the context), and beside a prompt alone
(`TpModelWorker`'s `max_req_input_len`, which a prompt must stay below)."""
_SAME = {"float32": ("float",)}
"""Other words of SGLang's for a dtype."""
_ARITHMETIC = ("attention_backend", "kv_cache_dtype", "tp_size")
"""Options that change bits; the kernel names those that are set."""


class Lost(Exception):
    """The server cannot answer now, or came back without its adapters."""


class Link:
    """A server and its client.

    kind: the model_type that it should run; dtype: "bfloat16", "float32". own: the server if it is
    ours, whose key is `keys`'. keys: headers of plain requests and of those that change the server.

    Raises:
        UserError: nothing is there, or it cannot run adapters on this model.
    """

    def __init__(
        self,
        url: str,
        kind: str,
        dtype: str,
        options: SglangConfig,
        keys: tuple[Mapping[str, str], Mapping[str, str]],
        own: OwnServer | None = None,
    ) -> None:
        self._kind, self._dtype, self._options, self._own = kind, dtype, options, own
        self._keys = keys
        try:
            self._connect(url)
        except Failed as error:
            raise UserError(f"{error}: is it an SGLang server?") from error
        if not self.steady:
            _log.warning(
                "the server at %s runs without --enable-deterministic-inference: the same request "
                "may get another text, so that neither a resumed run nor a second one is the same",
                url,
            )

    def _connect(self, url: str) -> None:
        options = self._options
        self.client = JsonClient(
            url,
            self._keys[0],
            timeout=options.timeout,
            retries=options.retries,
            wait=_WAIT,
            again_after_silence=False,
        )
        model, server = self._facts("model_info"), self._facts("server_info")
        name, kind = model.get("served_model_name"), model.get("model_type")
        if kind != self._kind:
            raise UserError(
                f"the server at {url} runs {model.get('model_path')!r}, a {kind}; the "
                f"config's model is a {self._kind}: start it with the same one"
            )
        self._check(url, server)
        self.max_loras = self._number(server, "max_loras_per_batch")
        self.max_rank = self._number(server, "max_lora_rank")
        loaded = server.get("max_loaded_loras")
        self.max_loaded: int | None = loaded if isinstance(loaded, int) else None
        bases = [card for card in self._cards() if card.get("parent") is None]
        context = self._number(bases[0] if bases else {}, "max_model_len")
        self.context = context - _RESERVED
        self.longest_prompt = context - _RESERVED_OF_PROMPT
        self.steady = bool(server.get("enable_deterministic_inference"))
        words = ["sglang", server.get("version"), name, server.get("dtype")]
        for option in _ARITHMETIC:
            if server.get(option) not in (None, "auto", 1):
                words.append(f"{option}={server[option]}")
        self.kernel = " ".join(map(str, words)) + (" deterministic" if self.steady else "")

    def _check(self, url: str, server: Mapping[str, Any]) -> None:
        """Raise UserError unless the server runs adapters on the weights that the driver has."""
        if not server.get("enable_lora"):
            raise UserError(
                f"the server at {url} runs no adapters: start it with --enable-lora, "
                "--max-lora-rank and --lora-target-modules"
            )
        replicas = server.get("dp_size", 1)
        if replicas != 1:
            raise UserError(
                f"the server at {url} runs {replicas} replicas, and SGLang loads adapters "
                "while it runs in one alone: start it with --dp-size 1"
            )
        if server.get("quantization") is not None:
            raise UserError(
                f"the server at {url} quantizes its weights ({server['quantization']}), and the "
                "search looks at whole ones: start it without --quantization"
            )
        if server.get("dtype") not in (self._dtype, *_SAME.get(self._dtype, ()), "auto"):
            raise UserError(
                f"the server at {url} computes in {server.get('dtype')}, and the config says "
                f"dtype: {self._dtype}: start it with --dtype {self._dtype}"
            )

    def _facts(self, path: str) -> Mapping[str, Any]:
        answer = self.client.get(path)
        if not isinstance(answer, dict):
            raise Failed(f"{self.client.url}/{path}: no facts: {str(answer)[:100]}")
        return answer

    def _number(self, facts: Mapping[str, Any], key: str) -> int:
        value = facts.get(key)
        if not isinstance(value, int):
            raise Failed(f"{self.client.url}: says no {key}")
        return value

    def load(self, alias: str, path: Path) -> str | None:
        """Have the server read an adapter's folder; why it does not, None if it does.

        Raises:
            Failed: the server cannot answer.
        """
        body = {"lora_name": alias, "lora_path": str(path)}
        try:
            self._change(self.client, "load_lora_adapter", body)
        except Failed as error:
            # Names are never used twice: it is there from an attempt whose answer was lost.
            if self._holds(alias):
                return None
            if error.of_server:
                raise
            return str(error)
        return None

    def unload(self, alias: str) -> None:
        """Have the server forget an adapter. One that it does not is left with it: names are never
        used twice. Raises Failed where the server cannot answer."""
        try:
            self._change(self.client, "unload_lora_adapter", {"lora_name": alias})
        except Failed as error:
            if error.of_server:
                raise

    def generate(self, body: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
        """Answers in the order of a batch, each with its ids and a finish reason. Raises as
        JsonClient.post."""
        rids: list[str] = []

        def fresh() -> Mapping[str, Any]:
            # The server refuses one that it has not yet seen the end of.
            rids[:] = (secrets.token_hex(8) for _ in range(count))
            return {"rid": list(rids), **body}

        answers = self.client.post("generate", fresh)
        where = f"{self.client.url}/generate"
        if not isinstance(answers, list) or len(answers) != count:
            raise Failed(f"{where}: expected {count} answers")
        try:
            named = [answer["meta_info"]["id"] for answer in answers]
            sound = all(map(_is_sound, answers))
        except (KeyError, TypeError) as error:
            raise Failed(f"{where}: an answer without {error}") from error
        if not sound or named != rids:
            raise Failed(f"{where}: answers of other requests, or without ids")
        return answers

    def check_held(self, alias: str | None) -> None:
        """Raise Lost if the server does not know an adapter that it was given."""
        if alias is not None and not self._holds(alias):
            raise Lost(f"{self.client.url} lost its adapters: it was started anew")

    def recover(self) -> None:
        """Start our server anew, or wait until the other is back.

        Raises:
            UserError: it does not come back in `start_timeout` seconds, or as another.
            Failed: it went away again.
        """
        before = self.kernel
        if self._own is not None:
            self._own.start()
            self._connect(self._own.url)
        else:
            self._wait()
            self._connect(self.client.url)
        if self.kernel != before:
            raise UserError(
                f"{self.client.url} came back as {self.kernel!r}, and was {before!r}: the same "
                "adapter would write other text; start the first one again and resume the run "
                "with --resume"
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + self._options.start_timeout
        while not healthy(self.client.url):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.client.url} did not come back in {self._options.start_timeout:g} s; "
                    "start it again and resume the run with --resume"
                )
            time.sleep(_LOOK)

    def close(self, aliases: Sequence[str]) -> None:
        """End the server if it is ours; have another forget adapters, as far as it answers."""
        if self._own is not None:
            self._own.close()
            return
        client = JsonClient(
            self.client.url,
            self._keys[0],
            timeout=min(_PARTING, self._options.timeout),
            retries=self._options.retries,
            wait=_WAIT,
            again_after_silence=False,
        )
        for alias in aliases:
            try:
                self._change(client, "unload_lora_adapter", {"lora_name": alias})
            except (Failed, UserError) as error:
                if isinstance(error, UserError) or error.of_server:
                    _log.warning("adapters stay on the server %s: %s", client.url, error)
                    return

    def _change(self, client: JsonClient, path: str, body: Mapping[str, Any]) -> None:
        answer = client.post(path, body, self._keys[1])
        if not isinstance(answer, dict) or "success" not in answer:
            raise Failed(f"{client.url}/{path}: no answer of SGLang's: {str(answer)[:100]}")
        if not answer["success"]:
            raise Failed(str(answer.get("error_message")), 200)

    def _holds(self, alias: str) -> bool:
        return any(card.get("id") == alias for card in self._cards())

    def _cards(self) -> list[Mapping[str, Any]]:
        cards = self._facts("v1/models").get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise Failed(f"{self.client.url}/v1/models: no models")
        return cards


def _is_sound(answer: Any) -> bool:
    ids, reason = answer["output_ids"], answer["meta_info"]["finish_reason"]
    return (
        isinstance(ids, list)
        and all(type(token) is int and token >= 0 for token in ids)
        and (reason is None or isinstance(reason, dict))
    )


def locked(url: str) -> bool:
    """Whether a server answers nothing without its key, as one that was given one does."""
    try:
        JsonClient(url, {}, timeout=_HEALTH, retries=0, wait=0).get("model_info")
    except Refused as error:
        return error.status == 401
    except (Failed, UserError):
        return False
    return False


def healthy(url: str) -> bool:
    """Whether a server answers, after a token that it generates."""
    try:
        JsonClient(url, {}, timeout=_HEALTH, retries=0, wait=0).get("health")
    except (Failed, UserError):
        return False
    return True
